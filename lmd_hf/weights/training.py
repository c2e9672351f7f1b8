"""What a training left beside its weights: the `trainer_state.json` of transformers' Trainer, with its loss curve."""

import json
from typing import Any

from lmd_hf.errors import FormatError
from lmd_hf.weights.local import readable
from lmd_hf.weights.repository import check_state
from lmd_hf.weights.source import FileSource, Source


def read_history(source: Source) -> tuple[str, list[dict[str, Any]]] | None:
    """(name of the file, its log history) of the training that made the weights; `None` where none is beside them.

    Of a Hub repository the one small file is fetched into the cache. Raises `SourceError` if it does not come,
    `FormatError` if it is no state of a trainer.
    """
    found = source.training() if isinstance(source, FileSource) else None
    if found is None:
        return None
    name, path = found
    try:
        with readable(path):
            check_state(name, path.stat().st_size)
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError(f"{name}: not the state of a trainer (JSON with a log_history)") from None
    if not isinstance(history, list):
        raise FormatError(f"{name}: its log_history is no list")
    return name, [entry for entry in history if isinstance(entry, dict)]
