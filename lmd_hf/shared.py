"""Settings of the whole process that several threads change at once."""

import threading
from collections.abc import Callable


class SharedSetting:
    """A setting of the whole process that several threads may hold at once: the last to leave puts back what the first
    one found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._restore: Callable[[], object] = lambda: None

    def enter(self, change: Callable[[], Callable[[], object]]) -> None:
        """Change the setting; what the change returns puts back what it found."""
        with self._lock:
            restore = change()
            if not self._holders:
                self._restore = restore
            self._holders += 1

    def leave(self) -> None:
        """Once for each `enter`, from any thread."""
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._restore()
