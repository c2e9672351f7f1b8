"""Reports as a dataset: pushed, read back, appended, and read by the datasets library itself."""

import time

import pytest

import lmd_hf
from lmd_hf import analyze
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.hub.dataset import load_results, push_results
from lmd_hf.weights.source import EMBEDDED_ID


TOKEN = "hf_test_token"


@pytest.fixture
def reports(hub, save):
    """Two models on the Hub, and a sketched report."""
    made = []
    for family in ("llama", "qwen2"):
        name = f"results/{family}-{time.time_ns() % 10**6}"
        hub.add(name, {path.name: path.read_bytes() for path in save(family).iterdir()})
        made.append(analyze(name, heads=True))
    return made


def dataset(hub):
    return f"tester/results-{time.time_ns() % 10**6}"


def test_a_report_comes_back_as_it_was_and_a_second_one_beside_it(hub, reports):
    where = dataset(hub)
    for report in reports:
        assert "/commit/" in push_results(report, where, token=TOKEN)
    assert [r.to_dict() for r in load_results(where)] == [r.to_dict() for r in reports]
    assert load_results(where, model=reports[1].model.id)[0].to_dict() == reports[1].to_dict()
    assert load_results(where, model=reports[1].model.id, commit="0" * 40) == []
    assert load_results(where, model="org/none") == []


def test_the_same_report_again_is_no_second_row(hub, reports):
    where = dataset(hub)
    for _ in range(2):
        push_results(reports[0], where, token=TOKEN)
    assert len(load_results(where)) == 1


def test_only_the_files_of_the_model_are_fetched(hub, reports):
    where = dataset(hub)
    for report in reports:
        push_results(report, where, token=TOKEN)
    hub.requests.clear()
    load_results(where, model=reports[0].model.id)
    assert not [path for _, path, _ in hub.requests if "results--qwen2" in path]


def test_a_pull_request_to_somebody_else_s_dataset(hub, reports):
    where = dataset(hub)
    push_results(reports[0], where, token=TOKEN)
    assert "/discussions/1" in push_results(reports[1], where, create_pr=True, token="hf_other_token")
    with pytest.raises(SourceError, match="permission"):
        push_results(reports[1], where, token="hf_third_token")


@pytest.mark.parametrize(
    "use",
    [
        lambda report: push_results(report, "bad name"),
        lambda _: load_results("bad name"),
        lambda report: analyze(report.model.id, reuse="bad name"),
    ],
)
def test_what_is_no_id_of_a_dataset_is_one_line(reports, use):
    with pytest.raises(SourceError, match="bad name: not the id of a repository"):
        use(reports[0])


def test_the_datasets_library_reads_both_configurations(hub, reports, tmp_path):
    import datasets

    where = dataset(hub)
    for report in reports:
        push_results(report, where, token=TOKEN)
    repo = hub.repos[where]
    for name, data in repo.commits[repo.branches["main"]].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    models = datasets.load_dataset(str(tmp_path), "models", cache_dir=str(tmp_path / "cache"))["train"]
    matrices = datasets.load_dataset(str(tmp_path), "matrices", cache_dir=str(tmp_path / "cache"))["train"]
    assert sorted(models["model"]) == sorted(report.model.id for report in reports)
    assert len(matrices) == sum(len(report.matrices) for report in reports)
    assert {"effective_rank", "singular_values", "role", "model"} <= set(matrices.column_names)


def test_sketched_rows_come_back(hub, reports):
    from dataclasses import replace

    first = reports[0]
    sketched = replace(first.matrices[0], intervals={"effective_rank": (1.0, 2.0)})
    where = dataset(hub)
    report = replace(first, matrices=(sketched, *first.matrices[1:]))
    push_results(report, where, token=TOKEN)
    assert load_results(where)[0].to_dict() == report.to_dict()


def test_a_report_that_nobody_can_check_is_refused(hub):
    with pytest.raises(SettingsError, match="at a commit of the Hub"):
        push_results(analyze(EMBEDDED_ID), "tester/results", token=TOKEN)


def test_analyze_takes_a_published_result_of_the_same_commit_and_settings_and_says_so(hub, reports, no_memory):
    where = dataset(hub)
    push_results(reports[0], where, token=TOKEN)
    name = reports[0].model.id
    hub.requests.clear()
    found = analyze(name, heads=True, reuse=where)
    assert found.environment["published"] == where
    assert f"published result, from {where}" in found.summary()
    assert found.to_dict()["matrices"] == reports[0].to_dict()["matrices"]
    assert "published" not in analyze(name, reuse=where).environment  # without heads: other settings
    earlier = analyze(name, heads=True, reuse=where, thresholds=lmd_hf.Thresholds(untrained_share=0.5))
    assert "published" not in earlier.environment  # another verdict is asked for
    repo = hub.repos[name]
    repo.commit({**repo.commits[repo.branches["main"]], "notes.md": b"x"})
    assert "published" not in analyze(name, heads=True, reuse=where).environment  # another commit


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("lfs", [True, False])
def test_of_two_models_in_one_commit_each_has_its_own_result(hub, save, lfs, download):
    """Their files have the same names and sizes; without LFS no hash is listed."""
    where, name = dataset(hub), f"results/two-{time.time_ns()}"
    files = {path.name: path.read_bytes() for path in save("llama").iterdir()}
    weights = files["model.safetensors"]
    other = files | {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])}
    folders = {"a": files, "b": other}
    hub.add(
        name, {f"{folder}/{file}": data for folder, each in folders.items() for file, data in each.items()}, lfs=lfs
    )
    asked = {"roles": ("q",), "reuse": where, "download": download}
    push_results(analyze(name, subfolder="a", roles=("q",), download=download), where, token=TOKEN)
    assert "published" not in analyze(name, subfolder="b", **asked).environment
    assert "published" in analyze(name, subfolder="a", **asked).environment or not lfs
