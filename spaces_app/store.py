"""Results that everybody may see, kept by commit; the least recently used go first."""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Store:
    """At most `room` bytes of results, by their size as text. `locks` let one visitor compute what others wait for."""

    room: int = 256 * 2**20
    kept: "OrderedDict[Hashable, tuple[Any, int]]" = field(default_factory=OrderedDict)
    locks: dict[Hashable, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, key: Hashable) -> Any:
        """The result, or `None`."""
        with self.lock:
            if key not in self.kept:
                return None
            self.kept.move_to_end(key)
            return self.kept[key][0]

    def add(self, key: Hashable, value: Any, size: int) -> None:
        """Keep it, and let go of the oldest where there is no room."""
        with self.lock:
            self.kept[key] = value, size
            while len(self.kept) > 1 and sum(size for _, size in self.kept.values()) > self.room:
                gone, _ = self.kept.popitem(last=False)
                self.locks.pop(gone, None)
