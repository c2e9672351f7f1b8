"""A script that annotates models on Hugging Face Jobs: it holds its requirements, its list and its volumes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from lmd_hf import __version__
from lmd_hf.compat import resolve_commit
from lmd_hf.errors import SettingsError
from lmd_hf.run.asked import hub_id
from lmd_hf.weights.answers import client, patiently, told


_SCRIPT = """\
# /// script
# requires-python = ">=3.10"
# dependencies = ["lmd-hf=={version}"]
#
# [tool.hf-jobs]
# flavor = "cpu-upgrade"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
# volumes = [
{volumes}
# ]
# ///
# Annotates {count} models by pull request, each one once, however often the job is started.
#
#     hf jobs uv run THIS_FILE
#
# Weights are read from the volumes, read-only repositories at the commits below. A model that has another commit by
# then, or no volume (this file runs anywhere), is read from the Hub by range; nothing is kept.
import sys

from lmd_hf.hub.batch import annotate_each
from lmd_hf.hub.job import show_volume


MODELS = {models}

for place, (model, commit) in enumerate(MODELS.items()):
    show_volume(model, commit, f"{root}/{{place}}")
failed = 0
for outcome in annotate_each(list(MODELS), how="pull"):
    print(f"{{outcome.model}}: {{outcome.status}}, {{outcome.reason}} {{outcome.url or ''}}", flush=True)
    failed += outcome.status == "failed"
sys.exit(failed > 0)
"""
ROOT = "/models"  # below which the volumes are mounted


def script(models: Mapping[str, str]) -> str:
    """The text of the script for {model: commit}. Raises `SettingsError` for an empty list."""
    if not models:
        raise SettingsError("the list names no model; write one a line")
    mounted = [f"hf://models/{model}@{commit}:{ROOT}/{i}:ro" for i, (model, commit) in enumerate(models.items())]
    volumes = "\n".join(f"#     {json.dumps(volume)}," for volume in mounted)
    listed = json.dumps(dict(models), indent=4)
    return _SCRIPT.format(version=__version__, count=len(models), volumes=volumes, models=listed, root=ROOT)


def pinned(models: Sequence[str], *, token: str | bool | None = None) -> dict[str, str]:
    """{model: the commit that main is at now}. Raises `SourceError` for a repository that cannot be seen."""
    api = client(token)

    def commit(model: str) -> str:
        return told(hub_id(model), lambda: patiently(lambda: resolve_commit(api, model, None)))

    return {model: commit(model) for model in models}


def show_volume(model: str, commit: str, folder: str) -> None:
    """Let the Hub's cache show a mounted repository as the snapshot of its commit, so that whatever reads that commit
    reads the volume; nothing where no volume is mounted, or the cache has the snapshot."""
    name = repo_folder_name(repo_id=model, repo_type="model")
    snapshot = Path(constants.HF_HUB_CACHE) / name / "snapshots" / commit
    if Path(folder).is_dir() and not snapshot.exists():
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.symlink_to(folder, target_is_directory=True)
