"""Completing a model's identity with the hashes of its weight files."""

import hashlib
from dataclasses import replace
from pathlib import Path

from lmd_hf.errors import FormatError, SourceError
from lmd_hf.records import ModelIdentity, WeightFile
from lmd_hf.weights.source import FileSource, Source


def with_hashes(source: Source) -> ModelIdentity:
    """The identity of a source, every weight file with its SHA-256 (the Hub's own where it is known).

    Nothing is fetched for it: a file that is not on disk and of which the Hub does not tell keeps `None`, and so does
    one that cannot be read any more, or is another than when the source was opened.
    """
    if not isinstance(source, FileSource):
        return source.identity
    return replace(source.identity, files=tuple(_hashed(source, file) for file in source.identity.files))


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
