"""How much of a training's time measuring may take, and what the next matrix will cost."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lmd_hf.errors import SettingsError
from lmd_hf.records import Work


FLOOR_SECONDS = 1.0  # at the start and at the end, so that a short training has both
ENDING_SECONDS = 3.0  # kept back for the figures and the card
FIRST_RATE = 1e9  # operations a second until the first matrix tells better: small matrices are slow


@dataclass
class Budget:
    """`share` of the time that the training itself takes; `None` is no limit. Not for several threads."""

    share: float | None
    clock: Callable[[], float] = time.perf_counter
    spent: float = 0.0
    started: float = field(init=False)
    _operations: float = field(default=0.0, init=False)
    _seconds: float = field(default=0.0, init=False)
    _warm: bool = field(default=False, init=False)
    _last: dict[tuple[str, str], float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.share is not None and not (isinstance(self.share, int | float) and 0 < self.share < math.inf):
            raise SettingsError(f"budget is {self.share}; give a share of the training time such as 0.02, or None")
        self.started = self.clock()

    @property
    def trained(self) -> float:
        """Seconds since the start that went into anything else than measuring."""
        return self.clock() - self.started - self.spent

    @property
    def used(self) -> float:
        """Seconds of measuring for each second of training."""
        return self.spent / max(self.trained, 1e-9)

    def room(self, floor: float = 0.0) -> float:
        """The seconds that may be spent now: what has been earned and not yet used, but at least `floor`."""
        if self.share is None:
            return math.inf
        return max(self.share * self.trained - self.spent - ENDING_SECONDS, floor)

    def expected(self, work: Work) -> float:
        """The seconds that a matrix will take: as long as the last time, else by its operations at the rate so far."""
        rate = self._operations / self._seconds if self._seconds else FIRST_RATE
        return self._last.get((work.ref.name, work.ref.part), work.flops / rate)

    @contextmanager
    def spending(self, work: Work | None = None) -> Iterator[None]:
        """What happens inside counts as measuring; that of one matrix tells what it will cost again."""
        begun = self.clock()
        try:
            yield
        finally:
            took = self.clock() - begun
            self.spent += took
            if work is not None and not self._warm:
                self._warm = True  # the first one has paid for imports and caches, and tells nothing of its own cost
            elif work is not None:
                self._last[work.ref.name, work.ref.part] = took
                self._operations += work.flops
                self._seconds += took
