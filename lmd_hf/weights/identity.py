"""Completing a model's identity with the hashes of its weight files."""

import hashlib
from dataclasses import replace

from lmd_hf.records import ModelIdentity, WeightFile
from lmd_hf.weights.source import FileSource, Source


def with_hashes(source: Source) -> ModelIdentity:
    """The identity of a source, every weight file with its SHA-256 (the Hub's own where it is known)."""
    if not isinstance(source, FileSource):
        return source.identity
    return replace(source.identity, files=tuple(_hashed(source, file) for file in source.identity.files))


def _hashed(source: FileSource, file: WeightFile) -> WeightFile:
    if file.sha256 is not None:
        return file
    with source.locate(file.name).open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return replace(file, sha256=digest.hexdigest())
