"""The model itself, with its weights, its tokenizer or its image processor: from where its matrices come from.

Through transformers, without remote code, at the commit that the source is pinned to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled
from torch import Tensor, nn

from lmd_hf.compat import local_processes, run_experts_on_cpu
from lmd_hf.errors import SettingsError, SourceError, first_line
from lmd_hf.run.workers import pick_device
from lmd_hf.weights.lora import is_adapter
from lmd_hf.weights.skeleton import BUILD_ERRORS, model_class, own_config
from lmd_hf.weights.source import FileSource, Source


Batch = dict[str, Tensor]
WHOLE = ("model.safetensors", "pytorch_model.bin")  # a file that stands for its folder


@dataclass(frozen=True)
class Origin:
    """What transformers' `from_pretrained` takes: a folder or a Hub id, and `revision`, `subfolder`, `token`. `remedy`
    is what to do where it fails."""

    name: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    remedy: str = ""

    def load(self, factory: Callable[..., Any], **more: Any) -> Any:
        """`factory(name, …)` without remote code. `SourceError` in one line where transformers cannot."""
        from transformers.utils import logging

        if are_progress_bars_disabled():
            logging.disable_progress_bar()
        try:
            return factory(self.name, **self.options, **more)
        except BUILD_ERRORS as error:
            raise SourceError(f"{self.name}: transformers cannot load it ({first_line(error)}){self.remedy}") from None


def origin(source: Source) -> Origin:
    """Where a source can be loaded from as a whole.

    Raises `SourceError` with the remedy for adapters (alone they have no forward pass), truncated models, models that
    need code of their own, and weight files without the rest of a model.
    """
    identity, config = source.identity, source.config
    refuse_factored(source)
    if source.updates or is_adapter(config):
        remedy = "merge it into its base (peft's merge_and_unload), save that, and analyse the folder"
        raise SourceError(f"{identity.id}: an adapter cannot be run by itself; {remedy}")
    if not isinstance(source, FileSource):
        return Origin(identity.id, remedy="; a live module may run on a dataset with a column 'input_ids' instead")
    _refuse_code(identity.id, config)
    if identity.commit is not None:
        return Origin(
            identity.id, {"revision": identity.commit, "subfolder": identity.subfolder, "token": source.token}
        )
    place = source.locate(identity.files[0].name)
    alone = Path(identity.id).is_file() and Path(identity.id).name not in WHOLE
    if config is None or alone or not isinstance(place, Path):
        raise SourceError(f"{identity.id}: no whole model to run; give a folder with config.json, or a Hub id")
    return Origin(str(place.parent))


def refuse_factored(source: Source) -> None:
    """`SourceError` for what `LMDModel.save_pretrained` wrote: transformers cannot load it, nor have its factors the
    roles of the matrices that they stand for."""
    if "truncated" in (source.config or {}):
        remedy = "give the folder that LMDModel.from_pretrained(…).merge().save_pretrained(FOLDER) writes"
        raise SourceError(f"{source.identity.id}: a truncated model, whose layers hold factors; {remedy}")


def load_model(source: Source, place: Origin, device: str = "auto") -> nn.Module:
    """The model with its weights: float32 on a CPU, its own type on a GPU, where accelerate spreads it over what there
    is (`device` "auto") or it goes to the one named. A live module is itself, as it is. What was loaded once is given
    again, until `source.loaded` is cleared."""
    if source.module is not None:
        return source.module
    kept = source.loaded if isinstance(source, FileSource) else {}
    if device not in kept:
        kept[device] = load_again(source, place, device)
        if isinstance(source, FileSource):
            for name in source.stamps:
                source.check(name)
    return kept[device]


def load_again(source: Source, place: Origin, device: str) -> nn.Module:
    """The model from its files, whatever was loaded before."""
    import transformers

    kind = model_class(source.identity.architectures) or transformers.AutoModel
    target = pick_device(device)
    options: dict[str, Any] = {"dtype": torch.float32}
    if target.type != "cpu":
        options = {"dtype": "auto", "device_map": "auto" if device == "auto" and local_processes() == 1 else target}
    model: nn.Module = place.load(partial(_load, kind, source.config), **options, trust_remote_code=False)
    if target.type == "cpu":
        run_experts_on_cpu(model)
    return model


def _load(kind: Any, config: dict[str, Any] | None, name: str, **options: Any) -> nn.Module:
    """With a configuration of ours in the place of one that would have the code of its forward pass fetched."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config is not None and (own := own_config(config)) != config:
        options["config"] = CONFIG_MAPPING[own["model_type"]].from_dict(own)
    model: nn.Module = kind.from_pretrained(name, **options)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; every part of the module is left in the mode that it was in."""
    modes = {child: child.training for child in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def forward(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """One forward pass, the inputs moved to where the model's first parameter is, with `more` keywords as they are.
    `SettingsError` in one line where the model does not take them."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    try:
        return model(**{name: value.to(device) for name, value in batch.items()}, **more)
    except BUILD_ERRORS as error:
        told = f"{type(model).__name__} fails on this data ({first_line(error)})"
        raise SettingsError(f"{told}; shorter texts (--seq-len) or a dataset of its own kind may help") from None


def _refuse_code(identifier: str, config: dict[str, Any] | None) -> None:
    try:
        own_config(config or {})
    except ValueError as error:
        raise SourceError(f"{identifier}: {error}; its weights alone work in the metrics identity and norm") from None
    model_type, code = (config or {}).get("model_type"), (config or {}).get("auto_map")
    if not code:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        told = f"{identifier}: running '{model_type}' needs code from its repository, and no remote code is ever run"
        raise SourceError(f"{told}; its weights alone work in the metrics identity and norm")
