"""A base model with an adapter's updates added, read from both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lmd_hf.errors import SourceError
from lmd_hf.weights.formats import list_weights
from lmd_hf.weights.lora import is_adapter, read_adapter
from lmd_hf.weights.source import FileSource, Source, open_source


AUTO = "auto"  # the base that the adapter names


def open_merged(model: str | Path | nn.Module | FileSource, base: str | Path | Source, **options: Any) -> FileSource:
    """The base as a source, with the adapter's weights as its `updates`; `options` are those of `open_source`. Both may
    be open already.

    The identity is the adapter's, with the files of both. Raises `SourceError` if `model` is no adapter or names no
    base.
    """
    adapter = open_source(model, **options)
    if not isinstance(adapter, FileSource) or not is_adapter(adapter.config):
        raise SourceError(f"{adapter.identity.id}: not a PEFT adapter; leave out the base")
    facts = read_adapter(adapter.config or {})
    named = facts.base if str(base) == AUTO else base
    if named is None:
        raise SourceError(f"{adapter.identity.id}: names no base model; give its id or folder instead of '{AUTO}'")
    if facts.kind != "LORA":
        raise SourceError(f"{adapter.identity.id}: a {facts.kind} adapter; merge it with peft")
    if facts.no_sum:
        remedy = "merge it with peft where that can be done, or analyse it without the base"
        raise SourceError(f"{adapter.identity.id}: {facts.no_sum}, so W + s·B·A is not the tuned model; {remedy}")
    revision = facts.revision if named == facts.base else None
    if isinstance(named, (str, Path)):
        named = open_source(named, revision=revision, token=options["token"], download=options["download"])
    below = named
    if not isinstance(below, FileSource):
        raise SourceError(f"{below.identity.id}: the base of an adapter must be files or a Hub id")
    files = {file.name for file in adapter.identity.files}
    identity = replace(
        below.identity,
        id=adapter.identity.id,
        revision=adapter.identity.revision,
        commit=adapter.identity.commit,
        files=below.identity.files + adapter.identity.files,
        subfolder=adapter.identity.subfolder,
        base=below.identity.id,
    )
    at = f" at {below.identity.commit}" if below.identity.commit else ""
    return replace(
        below,
        identity=identity,
        locate=lambda name: (adapter if name in files else below).locate(name),
        stamps=below.stamps | adapter.stamps,
        pickles=below.pickles | adapter.pickles,
        notes=(f"the adapter's updates are added to {below.identity.id}{at}", *below.notes),
        updates=list_weights(adapter.tensors, adapter.config, adapter.read),
        training=adapter.training,
    )
