"""The real Hub client against a Hub on the loopback interface."""

import pytest

from lmd_hf import analyze
from lmd_hf.api import plan
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.pipeline import Request
from lmd_hf.records import Settings
from lmd_hf.weights.source import open_source


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".json")}


@pytest.fixture
def llama(hub, save):
    """A sharded model on the Hub, under a fresh name so that nothing of it is cached; (id, commit)."""
    name = f"org/llama-{len(hub.requests)}-{id(hub.repos)}-{next(_COUNTER)}"
    return name, hub.add(name, files_of(save("llama", max_shard_size="20KB")))


_COUNTER = iter(range(1000))


def test_a_hub_model_gives_the_same_report_as_its_folder(llama, save):
    name, commit = llama
    remote, local = analyze(name), analyze(save("llama", max_shard_size="20KB"))
    assert [m.name for m in remote.matrices] == [m.name for m in local.matrices]
    assert [m.singular_values.tolist() for m in remote.matrices] == [m.singular_values.tolist() for m in local.matrices]
    assert remote.model.id == name
    assert remote.model.commit == commit
    assert [f.sha256 for f in remote.model.files] == [f.sha256 for f in local.model.files]


def test_a_plan_reads_headers_only(hub, llama, save):
    name, _ = llama
    todo = plan(name)
    assert len(todo.works) == 16
    size = sum(len(data) for file, data in hub.repos[name].commits[llama[1]].items() if file.endswith("safetensors"))
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.startswith("/cdn/")]
    assert ranges
    assert all(r for r in ranges), "every read of a weight file asks for a range"
    assert len(ranges) == len(todo.identity.files)
    assert size > 0


def test_the_first_range_is_enough_for_a_long_header_too(hub):
    """A header beyond the first 100 kB takes one more request, and only that."""
    import torch
    from safetensors.torch import save as to_bytes

    tensors = {f"model.layers.{i}.mlp.up_proj.a_rather_long_name_{i:04d}.weight": torch.ones(4, 4) for i in range(1200)}
    data = to_bytes(tensors)
    assert int.from_bytes(data[:8], "little") > 100_000
    hub.add("org/long-header", {"model.safetensors": data})
    assert len(open_source("org/long-header").tensors) == 1200
    assert len([1 for method, path, _ in hub.requests if method == "GET" and "/cdn/" in path]) == 2


def test_a_revision_is_pinned_once(hub, llama, save):
    name, first = llama
    second = hub.repos[name].commit(files_of(save("gpt2")), branch="other")
    assert analyze(name, revision="other", roles=("q",)).model.commit == second
    report = analyze(name, roles=("q",))
    assert (report.model.commit, report.model.revision) == (first, None)
    tree = [path for _, path, _ in hub.requests if "/tree/" in path or "/cdn/" in path]
    assert all(first in path or second in path for path in tree), "after the first answer only commits are asked for"


def test_a_subfolder(hub, save):
    hub.add("org/nested", {f"text_encoder/{name}": data for name, data in files_of(save("bert")).items()})
    report = analyze("org/nested", subfolder="text_encoder", roles=("q",))
    assert len(report.matrices) == 2
    assert (report.model.model_type, report.model.subfolder) == ("bert", "text_encoder")


@pytest.mark.parametrize("place", ["hub", "disk"])
def test_a_subfolder_that_is_not_there(hub, save, tmp_path, monkeypatch, place):
    """Nor does a folder without it pass for the repository of that name."""
    hub.add("org/nested", {f"text_encoder/{name}": data for name, data in files_of(save("bert")).items()})
    monkeypatch.chdir(tmp_path)
    if place == "disk":
        (tmp_path / "org/nested").mkdir(parents=True)
    with pytest.raises(SourceError, match="no folder 'text_encode' in it; check --subfolder"):
        analyze("org/nested", subfolder="text_encode")
    assert (place == "disk") == (not hub.requests)


def test_offline_uses_the_cache(hub, llama, monkeypatch):
    name, commit = llama
    before = analyze(name, download=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    after = analyze(name)
    assert after.model.commit == commit
    assert [m.spectral_norm for m in after.matrices] == [m.spectral_norm for m in before.matrices]


def test_a_private_repository_needs_its_token_and_never_leaks_it(hub, save):
    hub.add("org/private", files_of(save("bert")), private=True)
    with pytest.raises(SourceError, match="no such Hub repository"):
        analyze("org/private")
    report = analyze("org/private", token=hub.token, roles=("q",))
    assert len(report.matrices) == 2
    assert hub.token not in report.to_json()


def test_a_token_is_never_shown(hub, save):
    hub.add("org/shown", files_of(save("bert")))
    source = open_source("org/shown", token=hub.token)
    assert hub.token not in repr(source) + repr(Request(Settings(), where={"token": hub.token}))
    with pytest.raises(SettingsError, match="the token is empty, or has a space"):
        open_source("org/shown", token=f"{hub.token}\n")


def test_a_token_that_has_expired_says_so_of_a_public_model(hub, save):
    hub.add("org/expired", files_of(save("bert")))
    with pytest.raises(
        SourceError, match=r"answered 401 \(Invalid credentials.*\); the token is not, or no longer, valid"
    ):
        open_source("org/expired", token="hf_expired")


@pytest.mark.parametrize("answers", [[429], [503, 503]])
def test_a_hub_that_is_busy_at_first_is_waited_for(hub, llama, answers):
    hub.failing["info"] = answers
    assert open_source(llama[0]).identity.commit == llama[1]


def test_a_hub_that_stays_busy_is_not_called_unreachable(hub, llama, monkeypatch):
    monkeypatch.setattr("lmd_hf.weights.answers.TRIES", 1)
    hub.failing["info"] = [503] * 9
    with pytest.raises(SourceError, match="the Hub answered 503; try again later"):
        open_source(llama[0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("org/absent", {}, "no such Hub repository"),
        ("org/gated", {}, "gated; accept its terms"),
        ("org/plain", {"revision": "nope"}, "no revision 'nope'"),
        ("org/pickled", {}, r"pytorch_model.bin: (?:not a readable checkpoint|holds more than tensors)"),
        ("org/empty", {}, "no weights in it"),
        ("org/shardless", {}, "shards that are absent, first 'model-2.safetensors'"),
    ],
)
def test_what_cannot_be_opened_is_one_clear_line(hub, save, name, options, message):
    hub.add("org/gated", files_of(save("bert")), gated=True)
    hub.add("org/plain", files_of(save("bert")))
    hub.add("org/pickled", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    hub.add("org/empty", {"README.md": b"hello"})
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    hub.add("org/shardless", {"model.safetensors.index.json": index, "model-1.safetensors": b"x"})
    with pytest.raises(SourceError, match=message) as caught:
        open_source(name, **options)
    assert "\n" not in str(caught.value)


def test_after_a_download_a_second_look_fetches_nothing(hub, llama):
    name, _ = llama
    analyze(name, download=True)
    sent = hub.sent
    analyze(name)
    assert hub.sent == sent


@pytest.mark.parametrize("fault", ["error", "short", "loop"])
def test_a_download_that_fails_is_not_tried_again_for_every_matrix_and_shows_no_signed_address(hub, llama, fault):
    hub.always = fault
    with pytest.raises(SourceError, match=r"cannot download model-\S+ \(.*\); what has arrived is kept") as raised:
        analyze(llama[0], download=True)
    assert "secret" not in str(raised.value)
    assert len({path for _, path, part in hub.requests if "/cdn/" in path and not part}) == 1, "the first shard alone"


def test_a_hub_out_of_reach_says_so(hub):
    hub.down = True
    with pytest.raises(SourceError, match="the Hub cannot be reached"):
        open_source("org/never-seen")


@pytest.mark.parametrize(("size", "options"), [("20KB", {"match": "*layers.0.*", "download": True}), ("1GB", {})])
def test_offline_with_only_part_of_a_model_says_so(hub, save, monkeypatch, size, options):
    name = f"org/part-{next(_COUNTER)}"
    hub.add(name, files_of(save("llama", max_shard_size=size)))
    analyze(name, **options)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"not \(wholly\) in the cache"):
        open_source(name)
