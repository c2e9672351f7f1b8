"""The one place for feature detection: what differs between versions of Python and of our packages."""

import sys
from typing import Any


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["checkpoint_key_map", "resolve_commit", "tomllib", "unreachable_errors"]


def checkpoint_key_map(model: Any, names: list[str]) -> dict[str, tuple[str, bool]]:
    """{checkpoint name: (name in the model, whether several checkpoint tensors feed that parameter)}.

    Through the renamings and converters that transformers 5 itself loads with; where a version lacks them, or knows
    no better name, a tensor keeps its own.
    """
    parameters = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        prefix = f"{model.base_model_prefix}."
        return {name: (name if name in parameters else _with_prefix(name, prefix, parameters), False) for name in names}
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    result = {}
    for name in names:
        target, source = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters and name in parameters:
            target, source = name, None
        result[name] = (target, source is not None)
    return result


def _with_prefix(name: str, prefix: str, parameters: dict[str, Any]) -> str:
    candidates = (name, prefix + name, name.removeprefix(prefix))
    return next((c for c in candidates if c in parameters), name)


def resolve_commit(api: Any, repo_id: str, revision: str | None) -> str:
    """The commit that a revision of a model repository means now (from the cache when offline)."""
    if hasattr(api, "resolve_revision"):
        return str(api.resolve_revision(repo_id, revision=revision).resolved)
    return str(api.model_info(repo_id, revision=revision).sha)


def unreachable_errors() -> tuple[type[Exception], ...]:
    """What the Hub client raises when there is no answer: its HTTP library's errors, and newer ones of its own."""
    from huggingface_hub import errors

    try:
        from huggingface_hub.utils import httpx
    except ImportError:
        import httpx
    own = [getattr(errors, name, None) for name in ("RevisionResolutionError", "OfflineModeIsEnabled")]
    return (httpx.TransportError, errors.LocalEntryNotFoundError, *(error for error in own if error is not None))
