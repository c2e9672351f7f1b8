"""Reads of a source that were begun before anybody asked for them."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lmd_hf.weights.ranged import CONNECTIONS, Connection
from lmd_hf.weights.source import FileSource, Key, Memory


class Ahead:
    """What was begun of a model whose turn has not come, each part given once.

    `own` is a connection for these reads alone, so that what goes wrong with them is no fault of the model: whoever
    asks for what did not come reads it himself. What is given counts as fetched over `connection`.
    """

    def __init__(self, source: FileSource, connection: Connection, own: Connection, wanted: Iterable[Key]) -> None:
        self._connection, self._own = connection, own
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="lmd_hf.ahead")
        self._reads = {key: self._pool.submit(source.read, *key) for key in wanted}
        self._pool.shutdown(wait=False)  # its threads end with the last of them

    def take(self, key: Key) -> Tensor | None:
        """What was begun under that key, once it is here; `None` where it was not begun by now, or did not come."""
        read = self._reads.pop(key, None)
        if read is None or read.cancel() or read.exception() is not None:
            return None
        value = read.result()
        self._connection.count(key[0].file, value.nbytes)
        return value

    def halt(self) -> None:
        """Begin no more of it."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def end(self) -> None:
        """Break off what is under way too, and let go of what is here."""
        self.halt()
        self._own.end("not wanted any more")
        self._reads.clear()


def fetching(source: FileSource, wanted: Iterable[Key]) -> FileSource:
    """The source with those reads on their way, begun in that order; its `read` finds them."""
    assert source.connection is not None, "of a file on disk nothing is fetched"
    own, keys = source.connection.apart(), list(wanted)
    places = {file: source.locate(file) for file in {tensor.file for tensor, _, _ in keys}}
    apart = {name: at if isinstance(at, Path) else replace(at, connection=own) for name, at in places.items()}
    reader = replace(source, locate=apart.__getitem__, connection=own, memory=Memory(0))
    return replace(source, ahead=Ahead(reader, source.connection, own, keys))
