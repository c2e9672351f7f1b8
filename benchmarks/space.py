"""The Space under load: many visitors for minutes on this machine, through `gradio_client`.

    python benchmarks/space.py [--visitors 20] [--minutes 5]

The Space runs in a process of its own against the tests' Hub, which this process serves. Every visitor asks for one
thing after the other, drawn at random with a fixed seed: plans, reports, cards, maps, spectra and searches of a few
public models. One of them, whose token goes with each request, asks for a private model too; all others try it, and
have to be told that there is no such model. Times are those of whole requests as the client sees them. Memory is that
of the Space's process and of all processes together, each read once a second (resident; shared pages count in each).
"""

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from urllib.request import urlopen


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import hub_server  # noqa: E402


HUB = hub_server.start()
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
MODELS = 6
SECRET = "org/secret"
EMBEDDED = "lmd-hf/stdlib-llama-1m"
ASKED = ("plan", "analyze", "card", "summary", "map", "spectrum", "search")


def serve(home: str) -> tuple[str, subprocess.Popen[bytes], float]:
    """(address, process, seconds until it answered)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {**os.environ, "HF_HOME": home, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    log = (Path(home) / "log").open("w")
    process = subprocess.Popen([sys.executable, ROOT / "spaces_app" / "app.py"], env=told, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            urlopen(f"{url}/config", timeout=1).close()
            return url, process, time.perf_counter() - begun
        except OSError:
            time.sleep(0.05)


def fill() -> None:
    """A few public models, each of other weights, and a private one."""
    from safetensors.torch import load, save

    folder = ROOT / "lmd_hf" / "demo" / "model"
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    tensors = load(files["model.safetensors"])
    for index in range(MODELS):
        scaled = {name: value * (1 + index) for name, value in tensors.items()}
        HUB.add(f"org/model-{index}", {**files, "model.safetensors": save(scaled)})
    HUB.add(SECRET, files, private=True)


def visit(url: str, number: int, until: float, told: dict[str, list]) -> None:
    """One visitor's requests until the time is over; the first visitor's carry the token."""
    from gradio_client import Client

    draw = random.Random(number)
    client = Client(url, verbose=False, oauth_token=HUB.token if number == 0 else None)
    while time.perf_counter() < until:
        name, model = draw.choice(ASKED), draw.choice([EMBEDDED, *(f"org/model-{i}" for i in range(MODELS)), SECRET])
        words = ["org/model"] if name == "search" else [model]
        words += ["model.layers.1.mlp.up_proj.weight"] if name == "spectrum" else []
        begun = time.perf_counter()
        try:
            answer = client.predict(*words, api_name=f"/{name}")
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what a visitor would see
            refused = model == SECRET and number > 0 and "There is no model" in str(error)
            told["refused" if refused else "failed"].append(f"{name} {model}: {error}")
            continue
        told[name].append(time.perf_counter() - begun)
        if model == SECRET and number > 0 and name != "search":
            told["leaked"].append(str(answer)[:80])


def watch(pid: int, over: threading.Event, seen: list[tuple[float, float]]) -> None:
    """(MB of the process, MB of it and its children), once a second."""
    import psutil

    process = psutil.Process(pid)
    while not over.wait(1):
        sizes = [process.memory_info().rss]
        for child in process.children(recursive=True):
            try:
                sizes.append(child.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        seen.append((sizes[0] / 1e6, sum(sizes) / 1e6))


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5)
    options = parser.parse_args()
    fill()
    told: dict[str, list] = defaultdict(list)
    seen: list[tuple[float, float]] = []
    over = threading.Event()
    with tempfile.TemporaryDirectory() as home:
        url, process, up_after = serve(home)
        try:
            watcher = threading.Thread(target=watch, args=(process.pid, over, seen))
            watcher.start()
            until = time.perf_counter() + 60 * options.minutes
            visitors = [
                threading.Thread(target=visit, args=(url, number, until, told)) for number in range(options.visitors)
            ]
            for visitor in visitors:
                visitor.start()
            for visitor in visitors:
                visitor.join()
            over.set()
            watcher.join()
        finally:
            process.terminate()
            process.wait()
    report(options, told, seen, up_after)


def report(
    options: argparse.Namespace, told: dict[str, list], seen: list[tuple[float, float]], up_after: float
) -> None:
    """The table, and what went wrong."""
    import gradio
    import torch

    print(
        f"{options.visitors} visitors, {options.minutes:g} minutes, {os.cpu_count()} cores, "
        f"gradio {gradio.__version__}, torch {torch.__version__}; answering {up_after:.1f} s after the start\n"
    )
    print("| endpoint | requests | median s | 95 % s | most s |\n|---|---|---|---|---|")
    for name in ASKED:
        times = sorted(told[name])
        if times:
            high = times[min(int(0.95 * len(times)), len(times) - 1)]
            print(f"| /{name} | {len(times)} | {statistics.median(times):.2f} | {high:.2f} | {times[-1]:.2f} |")
    half = seen[len(seen) // 2 :]
    total = sum(len(told[name]) for name in ASKED)
    print(
        f"\nrequests {total}, failed {len(told['failed'])}, private results seen by others {len(told['leaked'])}, ",
        end="",
    )
    print(f"refusals of the private model {len(told['refused'])}")
    print(
        f"memory: process at most {max(own for own, _ in seen):.0f} MB, in the second half {half[0][0]:.0f} to "
        f"{half[-1][0]:.0f} MB; all processes at most {max(whole for _, whole in seen):.0f} MB"
    )
    for line in told["failed"][:5]:
        print("failed:", line)


if __name__ == "__main__":
    main()
