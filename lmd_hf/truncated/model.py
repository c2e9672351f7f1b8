"""A model with weights in factors, and its way to disk, to the Hub and back."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import ModelCard, ModelHubMixin, save_torch_state_dict, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lmd_hf import __version__
from lmd_hf.errors import FormatError, OutputError, SettingsError, SourceError, first_line
from lmd_hf.layers.linear import LMDLinear
from lmd_hf.report.plain import plain
from lmd_hf.run.asked import hub_id
from lmd_hf.truncated.base import COMPANIONS, read_companions, sharing
from lmd_hf.truncated.card import card_text
from lmd_hf.truncated.record import FactoredLayer, Truncation
from lmd_hf.weights.answers import told
from lmd_hf.weights.skeleton import BUILD_ERRORS, own_config


CONFIG, WEIGHTS = "config.json", "model*.safetensors"
OWN = ("README.md", "generation_config.json")  # companions that are written anew
WHERE = ("revision", "cache_dir", "force_download", "local_files_only", "token")  # what a download takes of the options


class LMDModel(nn.Module, ModelHubMixin):  # type: ignore[misc]  # seen as Any
    """A model of transformers of which some layers are `LMDLinear`: it runs as `model` does, and what this class does
    not have (`generate`, `config`, `device` …) is the model's. `truncation` says what was done to it.

    `save_pretrained`, `push_to_hub` and `from_pretrained` are those of huggingface_hub's `ModelHubMixin`, with its
    keywords. On disk are safetensors, the tokenizer or processor of the base, a card, and a config.json with the base's
    configuration inside; transformers refuses it with a clear error instead of filling the layers with noise.
    """

    def __init__(self, model: nn.Module, truncation: Truncation, companions: dict[str, bytes] | None = None) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.truncation = truncation
        self.companions = companions or {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        return self.model(*args, **kwargs)

    def merge(self) -> nn.Module:
        """The dense model: every `LMDLinear` multiplied out into the layer that it was (LASER-style edits). It shares
        all other parameters with this one, and saves as any model of transformers does."""
        dense = sharing(self.model)
        for layer in self.truncation.layers:
            dense.set_submodule(layer.name, _multiplied(dense.get_submodule(layer.name), layer))
        return dense

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card: base, method, sizes, the loss if it was measured, how to load it, every layer's rank."""
        return ModelCard(card_text(self.truncation, self.companions.get("README.md")))

    def _save_pretrained(self, save_directory: Path) -> None:
        config: Any = getattr(self.model, "config", None)
        if not hasattr(config, "to_dict") or type(self.model).__module__.partition(".")[0] != "transformers":
            told = f"{type(self.model).__name__} is no class of transformers, so nothing could load it again"
            raise SettingsError(f"{told}; save its state_dict, or merge() it")
        values = config.to_dict() | {"architectures": [type(self.model).__name__]}
        values.pop("_name_or_path", None)  # a place on this machine
        text = {"lmd_hf": __version__, "truncated": plain(self.truncation), "base_config": values}
        state, ties = _state(self.model)
        try:
            save_torch_state_dict(state, save_directory, metadata={"format": "pt"})
            for name, data in self.companions.items():
                if name not in OWN:
                    (save_directory / name).parent.mkdir(exist_ok=True)
                    (save_directory / name).write_bytes(data)
            if (generation := getattr(self.model, "generation_config", None)) is not None:
                generation.save_pretrained(save_directory)
            written = json.dumps(text | {"ties": ties}, indent=1, default=str, ensure_ascii=False)
            (save_directory / CONFIG).write_text(written + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"cannot write to {save_directory} ({error}); free some space or choose another folder"
            ) from None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "LMDModel":
        """The model of a folder or of a repository on the Hub, with the keywords of `ModelHubMixin`. Raises
        `SourceError` for a repository of another kind, `FormatError` for a damaged one, `SettingsError` for other
        keywords."""
        if unknown := ", ".join(sorted(options.keys() - set(WHERE))):
            known = ", ".join(WHERE)
            raise SettingsError(f"no option {unknown}; known: {known}. Move what is loaded with .to(device, dtype)")
        name = str(pretrained_model_name_or_path)
        found: LMDModel = super().from_pretrained(name if Path(name).is_dir() else hub_id(name), **options)
        return found

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "LMDModel":
        """What `ModelHubMixin` calls."""
        where = {name: options[name] for name in WHERE if options.get(name) is not None}
        folder = Path(model_id)
        if not folder.is_dir():
            patterns = [CONFIG, WEIGHTS, *COMPANIONS]
            download = lambda: snapshot_download(model_id, allow_patterns=patterns, **where)  # noqa: E731
            folder = Path(told(model_id, download, revision=where.get("revision")))
        config = _read_config(folder, model_id)
        try:
            truncation = Truncation.from_dict(config["truncated"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{model_id}: its config.json holds no readable record ({error!r})") from None
        model = _build(config["base_config"], truncation, model_id)
        _load(model, folder, config["ties"], model_id)
        if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(folder)
        return cls(model.eval(), truncation, read_companions(folder))


def _multiplied(module: nn.Module, layer: FactoredLayer) -> nn.Module:
    assert isinstance(module, LMDLinear), "every layer of the record holds factors"
    with torch.no_grad():
        w_OI = ((module.projection.double() * module.s.double()) @ module.similarity.double()).to(module.s.dtype)
    out, width = layer.shape
    with torch.device("meta"):
        if layer.transposed:
            from transformers.pytorch_utils import Conv1D

            dense: Any = Conv1D(out, width)
        else:
            dense = nn.Linear(width, out, bias=layer.bias)
    dense.weight = nn.Parameter((w_OI.T if layer.transposed else w_OI).contiguous())
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().clone())
    return dense.train(module.training)


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, and {name: the one that it is}."""
    first: dict[int, str] = {}
    state: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in first:
            ties[name] = first[id(value)]
        else:
            first[id(value)], state[name] = name, value.detach()
    return state, ties


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = {}
    except ValueError as error:
        raise FormatError(f"{name}: its config.json is no JSON ({error})") from None
    if not isinstance(config, dict) or not {"truncated", "base_config", "ties"} <= set(config):
        told = "not a model that lmd_hf.truncate made (its config.json holds no truncation)"
        raise SourceError(f"{name}: {told}; load it with transformers")
    return config


def _build(values: dict[str, Any], truncation: Truncation, name: str) -> nn.Module:
    """The model without its values: parameters on the meta device, buffers real, its layers as factors."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    (architecture,) = values.get("architectures") or ("",)
    kind = getattr(transformers, architecture, None)
    if kind is None or values.get("model_type") not in CONFIG_MAPPING:
        raise SourceError(f"{name}: this transformers has no '{architecture}'; upgrade it (no remote code is ever run)")
    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(own_config(values))
        with init_empty_weights():
            model: nn.Module = kind(config)
            for layer in truncation.layers:
                out, width = layer.shape
                model.set_submodule(layer.name, LMDLinear(width, out, layer.rank, bias=layer.bias))
    except (*BUILD_ERRORS, SettingsError) as error:
        raise FormatError(f"{name}: its config.json cannot be built ({error})") from None
    return model


def _load(model: nn.Module, folder: Path, ties: dict[str, str], name: str) -> None:
    state: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob(WEIGHTS)):
            state |= load_file(path)
        state |= {alias: state[of] for alias, of in ties.items()}
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise FormatError(f"{name}: its weights do not fit its config.json ({first_line(error)})") from None
    if missing or unexpected:
        told = f"{len(missing)} tensors are missing, {len(unexpected)} unknown, first '{[*missing, *unexpected][0]}'"
        raise FormatError(f"{name}: its weights do not fit its config.json: {told}")
    tie: Any = getattr(model, "tie_weights", None)
    if ties and tie is not None:
        tie()
