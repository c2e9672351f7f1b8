"""`lmd-hf reproduce`: its options, and what it prints and writes. Torch is imported by the experiments alone."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from lmd_hf.experiments.catalogue import EXPERIMENTS, SEEDS


def add_reproduce(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser's subcommands."""
    parser = commands.add_parser("reproduce", parents=[common], help="the paper's experiments")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", metavar="NAME", help="which experiment")
    which.add_argument("--list", action="store_true", help="name them all, with their questions")
    which.add_argument("--all", action="store_true", help="run them all, one after the other")
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, metavar="N", help=f"run with seeds 0 … N−1 (default: {SEEDS})"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write report.md, outcome.json and figures there (with --all: a folder each, and an index)",
    )
    parser.set_defaults(run=reproduce_command)


def reproduce_command(options: argparse.Namespace) -> None:
    """List the experiments, or run one or all of them."""
    if options.list:
        _list(options)
    elif options.all:
        outcomes = [_run(name, options.out and options.out / name, options) for name in EXPERIMENTS]
        if options.out is not None:
            _write_index(options.out)
        if options.json:
            print(json.dumps(outcomes, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        outcome = _run(options.name, options.out, options)
        if options.json:
            print(json.dumps(outcome, indent=1, ensure_ascii=False, allow_nan=False))


def _list(options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps([{"name": name, "question": question} for name, question in EXPERIMENTS.items()], indent=1))
        return
    width = max(map(len, EXPERIMENTS), default=0)
    for name, question in EXPERIMENTS.items():
        print(f"{name:<{width}}  {question}")


def _run(name: str, out: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    """Run one, write its files, print its report unless asked for JSON or quiet; its outcome as JSON types."""
    from lmd_hf.experiments.catalogue import load, reproduce
    from lmd_hf.experiments.outcome import outcome_writers
    from lmd_hf.report.files import write_folder

    load(name)  # an unknown name, and a folder that takes no file, are told before the work
    if out is not None:
        write_folder(out, {})
    if options.quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    started = time.perf_counter()
    outcome = reproduce(name, seeds=range(options.seeds))
    if not options.quiet:
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if out is not None:
        writers = outcome_writers(outcome)
        write_folder(out, writers)
        print(f"wrote {out}/: {', '.join(writers)}", file=sys.stderr)
    if not (options.json or options.quiet):
        print(outcome.to_markdown())
    return outcome.to_dict()


def _write_index(folder: Path) -> None:
    from lmd_hf.experiments.outcome import index_page
    from lmd_hf.report.files import text_writer, write_folder

    write_folder(folder, {"README.md": text_writer(index_page(folder, tuple(EXPERIMENTS)))})
