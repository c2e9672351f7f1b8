"""Which bytes a model is: the hashes of its weight files, and cheaper marks that tell two models apart."""

import hashlib
from dataclasses import replace
from pathlib import Path

from lmd_hf.errors import FormatError, SourceError
from lmd_hf.records import ModelIdentity, WeightFile
from lmd_hf.weights.source import FileSource, Source


BLOCKS, BLOCK = 512, 4096  # of a file: how many, and their bytes


def with_hashes(source: Source) -> ModelIdentity:
    """The identity of a source, every weight file with its SHA-256 (the Hub's own where it is known).

    Nothing is fetched for it: a file that is not on disk and of which the Hub does not tell keeps `None`, and so does
    one that cannot be read any more, or is another than when the source was opened.
    """
    if not isinstance(source, FileSource):
        return source.identity
    return replace(source.identity, files=tuple(_hashed(source, file) for file in source.identity.files))


def marks(source: Source) -> dict[str, str | None]:
    """What two processes that work on one model must agree on, where both know it: its identity, the hashes of its
    files, which links into the Hub's cache tell, and digests of blocks spread evenly over each file on disk. Raises
    `SourceError` or `FormatError` if a file cannot be read any more."""
    identity, files = source.identity, source.identity.files
    known = {file.name: file.sha256 for file in files}
    sampled = {
        f"blocks of {file.name}": _sampled(source, file)
        for file in files
        if isinstance(source, FileSource) and file.name in source.stamps
    }
    return {"": repr(replace(identity, files=tuple(replace(file, sha256=None) for file in files))), **known, **sampled}


def _sampled(source: FileSource, file: WeightFile) -> str:
    digest = hashlib.sha256()
    with source.opened(file.name) as stream:
        for start in range(0, file.bytes, max(BLOCK, file.bytes // BLOCKS)):
            stream.seek(start)
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def _hashed(source: FileSource, file: WeightFile) -> WeightFile:
    if file.sha256 is not None or not source.on_disk(file.name) or not isinstance(source.locate(file.name), Path):
        return file
    digest = hashlib.sha256()
    try:
        with source.opened(file.name) as stream:
            while block := stream.read(2**20):
                digest.update(block)
    except (SourceError, FormatError):  # whoever needs its matrices says so
        return file
    return replace(file, sha256=digest.hexdigest())
