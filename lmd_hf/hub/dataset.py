"""Reports as rows of a dataset on the Hub: one configuration for matrices, one for models, one file each a report."""

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd

from lmd_hf.errors import SettingsError
from lmd_hf.report.plain import plain
from lmd_hf.report.report import Report
from lmd_hf.run.asked import check_type, hub_id
from lmd_hf.run.results import MATRICES, MODELS, NESTED, read_results, slug
from lmd_hf.weights.answers import client, told


if TYPE_CHECKING:
    from collections.abc import Sequence

CARD = """\
---
tags:
- lmd
configs:
- config_name: models
  data_files: data/models/**/*.parquet
  default: true
- config_name: matrices
  data_files: data/matrices/**/*.parquet
---
# Layer Matrix Decompositions

One row a model and, in `matrices`, one row a weight matrix: ranks, noise, capacity and spectra, made by lmd_hf.
`lmd_hf.load_results` gives the reports back.
"""


def push_results(
    report: Report,
    dataset_id: str,
    *,
    create_pr: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Append a report to a dataset on the Hub, which is made if it is not there; returns the address of the commit, or
    of the pull request.

    `data/models/MODEL/COMMIT-VERSION-DIGEST.parquet` has one row, `data/matrices/…` one a matrix, so that appending
    never touches what is there and the same report again is the same file. Raises `SettingsError` for a report without
    a commit, which nobody could check, and `SourceError` where the Hub refuses.
    """
    check_type("report", report, (Report, "what lmd_hf.analyze gave"))
    if report.model.commit is None:
        raise SettingsError(
            f"{report.model.id}: only a model at a commit of the Hub can be published; analyze it by its id"
        )
    name = file_name(report)
    models, matrices = rows(report)
    files = {f"{MODELS}/{name}": _parquet([models]), f"{MATRICES}/{name}": _parquet(matrices)}
    api = client(token)

    def push() -> CommitInfo:
        api.create_repo(dataset_id, repo_type="dataset", exist_ok=True, private=private)
        if not api.file_exists(dataset_id, "README.md", repo_type="dataset"):
            files["README.md"] = CARD.encode()
        return api.create_commit(
            dataset_id,
            [CommitOperationAdd(path, data) for path, data in files.items()],
            commit_message=f"Add {report.model.id} @ {str(report.model.commit)[:12]}",
            repo_type="dataset",
            create_pr=create_pr,
        )

    # not again by itself: after a lost answer a second commit would be empty, a second pull request would not
    done = told(hub_id(dataset_id), push)
    return str(done.pr_url or done.commit_url)


def load_results(
    dataset_id: str, *, model: str | None = None, commit: str | None = None, token: str | bool | None = None
) -> "list[Report]":
    """The reports of a dataset, of all models or of one, newest version of lmd_hf last.

    Only the files of that model are fetched. Raises `SourceError` where the dataset cannot be read, `FormatError` for
    files that are no report.
    """
    return [Report.from_dict(values) for values in read_results(dataset_id, model=model, commit=commit, token=token)]


def rows(report: Report) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the row of the model, the rows of its matrices), JSON types; together they are the whole report."""
    whole = report.to_dict()
    key = {"model": report.model.id, "commit": report.model.commit, "version": report.lmd_hf}
    matrices = [key | {"place": place} | row for place, row in enumerate(whole.pop("matrices"))]
    nested = sorted({name for matrix in matrices for name, value in matrix.items() if isinstance(value, dict)})
    for matrix in matrices:  # a column of dictionaries would get the keys of all of them
        matrix.update({name: json.dumps(matrix[name]) for name in nested})
    coverage = report.coverage
    return key | {
        "model_type": report.model.model_type,
        "metric": report.settings["metric"],
        "parameters": coverage.parameters,
        "decomposed": coverage.decomposed,
        "matrices": len(matrices),
        "convergence": report.convergence.verdict,
        NESTED: nested,
        "report": json.dumps(whole, ensure_ascii=False),
    }, matrices


def file_name(report: Report) -> str:
    """MODEL/COMMIT-VERSION-DIGEST.parquet, the digest that of the settings and the weight files: one file for every
    outcome that may differ."""
    asked = {name: value for name, value in report.settings.items() if name != "device"}
    told_apart = json.dumps([asked, plain(report.model.files)], sort_keys=True)
    digest = hashlib.sha256(told_apart.encode()).hexdigest()[:12]
    return f"{slug(report.model.id)}/{report.model.commit}-{report.lmd_hf}-{digest}.parquet"


def _parquet(values: "Sequence[dict[str, Any]]") -> bytes:
    from datasets import Dataset

    stream = io.BytesIO()
    Dataset.from_list(list(values)).to_parquet(stream)
    return stream.getvalue()
