"""A script that annotates models on Hugging Face Jobs: it holds its own requirements and its list."""

import json
from collections.abc import Sequence

from lmd_hf import __version__
from lmd_hf.errors import SettingsError


_SCRIPT = """\
# /// script
# requires-python = ">=3.10"
# dependencies = ["lmd-hf=={version}"]
# ///
# Annotates {count} models by pull request, each one once, however often the job is started.
#
#     hf jobs uv run --secrets HF_TOKEN --flavor cpu-upgrade --timeout 6h THIS_FILE
#
# Weights are read from the Hub by range, a few megabytes at a time; nothing is kept.
import sys

from lmd_hf.hub.batch import annotate_each


MODELS = {models}

failed = 0
for outcome in annotate_each(MODELS, how="pull"):
    print(f"{{outcome.model}}: {{outcome.status}}, {{outcome.reason}} {{outcome.url or ''}}", flush=True)
    failed += outcome.status == "failed"
sys.exit(failed > 0)
"""


def script(models: Sequence[str]) -> str:
    """The text of the script. Raises `SettingsError` for an empty list."""
    if not models:
        raise SettingsError("the list names no model; write one a line")
    return _SCRIPT.format(version=__version__, count=len(models), models=json.dumps(list(models), indent=4))
