"""Published results read back: reports that `push_results` wrote into a dataset on the Hub."""

import json
import re
from typing import Any

import pyarrow.parquet
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from lmd_hf.errors import FormatError
from lmd_hf.run.asked import hub_id
from lmd_hf.weights.answers import client, patiently, told


MODELS, MATRICES = "data/models", "data/matrices"  # the two configurations, a file each a report
KEY = ("model", "commit", "version", "place")  # what a row has beside the numbers of a matrix
NESTED = "json_columns"  # of a model's row: the columns of its matrices that hold JSON text


def read_results(
    dataset_id: str, *, model: str | None = None, commit: str | None = None, token: str | bool | None = None
) -> list[dict[str, Any]]:
    """The reports as JSON types, of all models, of one, or of one at a commit.

    Only the files of that model are fetched. Raises `SourceError` where the dataset cannot be read and `FormatError`
    for files that are no such reports.
    """
    api = client(token)
    folder = MODELS if model is None else f"{MODELS}/{slug(model)}"

    def read() -> list[dict[str, Any]]:
        try:
            listing = api.list_repo_tree(dataset_id, folder, recursive=True, repo_type="dataset")
            names = sorted(entry.path for entry in listing if entry.path.endswith(".parquet"))
        except EntryNotFoundError:
            return []
        return [_report(dataset_id, name, token) for name in names if commit is None or f"/{commit}-" in name]

    return told(hub_id(dataset_id), lambda: patiently(read))


def slug(model: str) -> str:
    """A Hub id as the name of a folder."""
    return re.sub(r"[^\w.-]+", "--", model).strip(".-")


def _report(dataset_id: str, name: str, token: str | bool | None) -> dict[str, Any]:
    def table(path: str) -> list[dict[str, Any]]:
        return pyarrow.parquet.read_table(
            hf_hub_download(dataset_id, path, repo_type="dataset", token=token)
        ).to_pylist()

    try:
        (row,) = table(name)
        texts = set(row[NESTED])
        matrices = sorted(table(name.replace(MODELS, MATRICES, 1)), key=lambda each: each["place"])
        plain = [
            {key: json.loads(value) if key in texts else value for key, value in matrix.items() if key not in KEY}
            for matrix in matrices
        ]
        return {**json.loads(row["report"]), "matrices": plain}
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{dataset_id}: {name} is no report of lmd_hf ({error}); remove it there") from None
