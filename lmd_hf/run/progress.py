"""A bar over the work of all ranks, where there is a terminal and the work takes a while."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count

from huggingface_hub.utils import tqdm

from lmd_hf.changes import Pair
from lmd_hf.records import Work
from lmd_hf.run.world import World


QUIET_SECONDS = 2  # work shorter than this shows no bar
REFRESH_SECONDS = 0.2
Listener = Callable[[int, int, str], None]  # (how many are done, of how many, the name of the one just done)
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_BAR = {"leave": False, "disable": None, "bar_format": "{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"}


@contextmanager
def following(listener: Listener) -> Iterator[None]:
    """What `analyze` and `compare` do in this context is told to `listener(done, total, name)`, matrix by matrix, in
    the thread that called them; it counts this process's own share."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def progress_bar(what: str, works: Sequence[Work | Pair], world: World) -> Iterator[Callable[[Work | Pair], None]]:
    """A bar on rank 0; what it gives counts one work as done."""
    total = sum(work.flops for work in works) or 1.0
    over = threading.Event()
    done = world.counter()
    listener, places = _listener.get(), count(1)
    hidden = None if world.rank == 0 else True  # None: where there is a terminal
    with tqdm(total=100, desc=what, delay=QUIET_SECONDS, name="lmd_hf.analyze", **(_BAR | {"disable": hidden})) as bar:

        def follow() -> None:
            while not over.wait(REFRESH_SECONDS):
                bar.update(100 * done.add(0) / total - bar.n)

        follower = threading.Thread(target=follow if world.rank == 0 else over.wait, daemon=True)
        follower.start()

        def finished(work: Work | Pair) -> None:
            done.add(work.flops)
            if listener is not None:
                listener(next(places), len(works), _name(work))

        try:
            yield finished
        finally:
            over.set()
            follower.join()


def _name(work: Work | Pair) -> str:
    return work.ref.name if isinstance(work, Work) else work.base.name
