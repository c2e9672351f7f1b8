"""Completing a model's identity with the hashes of its weight files."""

import hashlib
from dataclasses import replace
from pathlib import Path

from lmd_hf.records import ModelIdentity, WeightFile
from lmd_hf.weights.source import FileSource, Source


def with_hashes(source: Source) -> ModelIdentity:
    """The identity of a source, every weight file with its SHA-256 (the Hub's own where it is known).

    Nothing is fetched for it: a file that is not on disk and of which the Hub does not tell keeps `None`.
    """
    if not isinstance(source, FileSource):
        return source.identity
    return replace(source.identity, files=tuple(_hashed(source, file) for file in source.identity.files))


def _hashed(source: FileSource, file: WeightFile) -> WeightFile:
    path = source.locate(file.name) if file.sha256 is None and source.on_disk(file.name) else None
    if not isinstance(path, Path):
        return file
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return replace(file, sha256=digest.hexdigest())
