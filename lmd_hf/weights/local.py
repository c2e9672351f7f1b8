"""Files on this machine's disks: they may be refused, or replaced while they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmd_hf.errors import SourceError


Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp:
    """What tells a file from one that is written over it or renamed into its place: its size, and when its bytes and
    its entry were last changed (a rename changes the second even where the first was kept). Not the inode, which
    mounted object stores make up anew."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


@contextmanager
def readable(where: str | Path) -> Iterator[None]:
    """What the disk refuses in this context raises `SourceError` in one line."""
    try:
        yield
    except OSError as error:
        remedy = "check that it is still there and that you may read it"
        raise SourceError(f"{error.filename or where}: {error.strerror or error}; {remedy}") from None
