"""Two machines share one run: each has a network, a host name and a disk of its own, in namespaces of Linux."""

import json
import os
import subprocess
import sys

import pytest

from lmd_hf import analyze


pytestmark = pytest.mark.slow

# A machine's own name leads to the loopback, as Debian has it, and the other's to the network between them. The second
# one sees none of what the first has in SHARED.
MACHINE = """
hostname machine$N
printf "127.0.0.1 localhost\\n127.0.1.1 machine$N\\n10.77.0.$((2 - N)) machine$((1 - N))\\n" > "$HOSTS"
mount --bind "$HOSTS" /etc/hosts
if [ $N = 1 ]; then mount -t tmpfs none "$SHARED"; fi
exec "$@"
"""
LINK = ["v0", "netns", "lmd_hf_0", "type", "veth", "peer", "name", "v1", "netns", "lmd_hf_1"]


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture
def machines():
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a network of its own wants Linux and root")
    try:
        for n in (0, 1):
            ip("netns", "add", f"lmd_hf_{n}")
        ip("link", "add", *LINK)
        for n in (0, 1):
            ip("-n", f"lmd_hf_{n}", "addr", "add", f"10.77.0.{n + 1}/24", "dev", f"v{n}")
            ip("-n", f"lmd_hf_{n}", "link", "set", "lo", "up")
            ip("-n", f"lmd_hf_{n}", "link", "set", f"v{n}", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network of its own can be made here ({error})")
    else:
        yield
    finally:
        for n in (0, 1):
            ip("netns", "delete", f"lmd_hf_{n}", check=False)


def run(folder, *arguments):
    """What both machines write to stdout and stderr, and their exit codes."""
    started = []
    for n in (0, 1):
        torchrun = f"--nnodes 2 --node_rank {n} --nproc_per_node 2 --master_addr machine0 --master_port 29500".split()
        there = {"N": str(n), "HOSTS": str(folder.parent / f"hosts{n}"), "SHARED": str(folder)}
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", f"lmd_hf_{n}", "unshare", "-m", "-u", "sh", "-c", MACHINE, "sh",
                 sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "lmd_hf", *map(str, arguments)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **there, "HF_ASSETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
            )
        )  # fmt: skip
    return [(*each.communicate(timeout=200), each.returncode) for each in started]


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.mark.usefixtures("machines")
def test_two_machines_give_the_rows_and_numbers_of_one(save, disk):
    expected = json.loads(analyze(save("qwen3")).to_json())["matrices"]
    (report, told, code), (nothing, told_there, code_there) = run(disk, "analyze", save("qwen3"), "--json")
    assert (code, code_there, nothing) == (0, 0, ""), told + told_there
    found = json.loads(report)
    assert (found["environment"]["processes"], found["environment"]["reused"]) == (4, 0)
    assert found["matrices"] == expected


@pytest.mark.usefixtures("machines")
def test_the_machine_of_rank_0_has_the_reports_of_all(save, disk):
    folders = [save(family) for family in ("llama", "gpt2", "bert", "qwen3", "mixtral")]
    outcomes = run(disk, "analyze", *folders, "--out", disk / "out", "-q")
    assert [code for *_, code in outcomes] == [0, 0], outcomes
    reports = [json.loads(file.read_text()) for file in (disk / "out").glob("*/report.json")]
    assert sorted(report["model"]["id"] for report in reports) == sorted(map(str, folders))
