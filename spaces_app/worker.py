"""One request in a process of its own, the only place where weights are opened: it can be stopped, bounded and
forgotten.

A line of JSON on stdin asks: {"what": a key of TASKS, "memory": bytes, and that task's keywords}. Lines of JSON answer:
{"plan": …}, {"progress": [done, total, name]}, at last {"done": …} or {"error": one sentence}. `--warm` imports what
takes seconds before the question comes.
"""

import dataclasses
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, TextIO

import lmd_hf


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST_EXACT = 1024  # short side up to which all axes of a matrix are taken, else the leading `AXES`
AXES = 256
RESERVED = 2**30  # bytes of threads and libraries that are counted, but not used
Say = Callable[[dict[str, Any]], None]


def main() -> None:
    """Answer the one question that comes on stdin; an end of file is none."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    if "--warm" in sys.argv:
        warm()
    line = sys.stdin.readline()
    if line.strip():
        answer(json.loads(line), answers)


def warm() -> None:
    """Import torch and the stages."""
    _ = lmd_hf.analyze, lmd_hf.annotate, lmd_hf.interactive


def answer(request: dict[str, Any], answers: TextIO) -> None:
    """Do what is asked within the memory that it may take, and say what came of it."""
    what, memory = request.pop("what"), request.pop("memory")
    hard = int(memory) + RESERVED
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))

    def say(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        with lmd_hf.following(lambda done, total, name: say({"progress": [done, total, name]})):
            say({"done": TASKS[what](say=say, **request)})
    except lmd_hf.LmdError as error:
        say({"error": str(error)})
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        say({"error": f"this takes more than the {memory / 1e9:.1f} GB of memory that one request may have here"})


def plan(say: Say, model: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """What an analysis would do, and `refusal`, one sentence, if that is more than `limits` allow."""
    return _planned(_open(model), limits)


def analyze(say: Say, model: dict[str, Any], limits: dict[str, float]) -> str:
    """The plan first, then the report as JSON."""
    source = _open(model)
    planned = _planned(source, limits)
    say({"plan": planned})
    if planned["refusal"]:
        raise lmd_hf.LmdError(planned["refusal"])
    return _named(lmd_hf.analyze(source, heads=True), model).to_json()


def compare(say: Say, base: dict[str, Any], tuned: dict[str, Any], limits: dict[str, float]) -> str:
    """The comparison as JSON."""
    sources = _open(base), _open(tuned)
    for source in sources:
        if refusal := _planned(source, limits)["refusal"]:
            raise lmd_hf.LmdError(refusal)
    made = lmd_hf.compare(*sources)
    names = {
        side: dataclasses.replace(getattr(made, side), id=told["id"])
        for side, told in (("base", base), ("tuned", tuned))
    }
    return dataclasses.replace(made, **names).to_json()


def factors(say: Say, model: dict[str, Any], part: str, layer: int | None) -> dict[str, Any]:
    """The five factors of one matrix, small enough to send; of a large one the leading axes."""
    w = lmd_hf.read_matrix(_open(model), part, layer=layer)
    large = min(w.shape) > LARGEST_EXACT
    lmd = lmd_hf.decompose(w, rank=AXES, kernel="sketch") if large else lmd_hf.decompose(w)
    return lmd_hf.interactive.Factors.of(w, lmd).to_dict()


def directions(say: Say, model: dict[str, Any], part: str, layer: int | None) -> dict[str, Any]:
    """The tokens nearest to the leading directions of a head or a matrix."""
    found = lmd_hf.read_directions(_open(model), part, layer=layer)
    return {**dataclasses.asdict(found), "model": model["id"]}


def card(say: Say, model: dict[str, Any], report: str, how: str) -> dict[str, Any]:
    """What a pull request would change, or what became of it."""
    made = lmd_hf.annotate(model["place"], how=how, token=model["token"], report=lmd_hf.Report.from_json(report))
    diff = made.draft.diff() if made.draft is not None else ""
    return {"status": made.status, "reason": made.reason, "url": made.url, "diff": diff}


TASKS: dict[str, Callable[..., Any]] = {
    "plan": plan,
    "analyze": analyze,
    "compare": compare,
    "factors": factors,
    "directions": directions,
    "card": card,
}


def _open(model: dict[str, Any]) -> Any:
    source = lmd_hf.open_source(model["place"], revision=model["revision"], token=model["token"])
    if any(file.name.endswith(PICKLES) for file in source.identity.files):
        raise lmd_hf.LmdError(
            f"{model['id']}: its weights are pickles, which are not opened here; convert them to safetensors"
        )
    return source


def _planned(source: Any, limits: dict[str, float]) -> dict[str, Any]:
    planned = lmd_hf.plan_to_dict(lmd_hf.plan(source))
    return {**planned, "refusal": _refusal(planned, limits)}


def _refusal(planned: dict[str, Any], limits: dict[str, float]) -> str:
    """Why it is too much for this hardware, and what to do instead; empty if it is not."""
    reasons = [
        f"{planned[name] / size:,.1f} {unit} {word} (the limit is {limits[name] / size:,.1f})"
        for name, size, unit, word in (
            ("expected_seconds", 60, "minutes", "of work"),
            ("memory_bytes", 1e9, "GB", "of memory"),
            ("bytes_to_fetch", 1e9, "GB", "to fetch"),
        )
        if planned[name] > limits[name]
    ]
    if not reasons:
        return ""
    name = planned["model"]["id"]
    command = f"lmd-hf analyze {name} --out lmd/"
    return f"{name} is too large for this Space: {', '.join(reasons)}; run it where there is more room: {command}"


def _named(report: Any, model: dict[str, Any]) -> Any:
    """Under the name that the visitor gave: of a local folder the path is nobody's business."""
    return dataclasses.replace(report, model=dataclasses.replace(report.model, id=model["id"]))


if __name__ == "__main__":
    main()
