"""`lmd-hf annotate`, `webhook` and `job`: their options, and what they print. Torch is imported by the work alone."""

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.visible import visible, visible_lines


if TYPE_CHECKING:
    from lmd_hf.hub.annotate import Outcome
    from lmd_hf.run.world import World


def add_annotate(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser's subcommands."""
    parser = commands.add_parser(
        "annotate", parents=[common], help="put the section into model cards: as a diff, or by pull request"
    )
    parser.add_argument("model", nargs="*", metavar="MODEL", help="a Hub id; with --to also a folder or a weight file")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--create-pr", action="store_true", help="open a pull request, or renew an own open one")
    how.add_argument("--push", action="store_true", help="commit to main of an own repository")
    how.add_argument("--to", type=Path, metavar="FILE", help="edit this local card, and write lmd/ beside it")
    parser.add_argument("--force", action="store_true", help="ask again where an earlier pull request was closed")
    parser.add_argument("--skip-list", type=Path, metavar="FILE", help="models to leave alone, one a line")
    many = parser.add_argument_group("many models")
    many.add_argument("--from-file", type=Path, metavar="FILE", help="models, one a line")
    many.add_argument("--author", help="every model of a user or an organisation")
    many.add_argument("--search", help="the models that a search on the Hub finds")
    many.add_argument("--limit", type=int, default=100, help="at most so many of them (default: 100)")
    many.add_argument(
        "--queue",
        type=Path,
        metavar="FILE",
        help="keep the list and what became of each in this SQLite file, and go on there after an interruption",
    )
    parser.set_defaults(run=annotate_command, shared=True)
    webhook = commands.add_parser(
        "webhook", parents=[common], help="annotate models when the Hub says that they changed"
    )
    webhook.add_argument("--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1)")
    webhook.add_argument("--port", type=int, default=7860, help="port to serve on (default: 7860)")
    webhook.add_argument("--queue", type=Path, default=Path("lmd-queue.sqlite"), metavar="FILE", help="SQLite file")
    webhook.add_argument("--skip-list", type=Path, metavar="FILE", help="models to leave alone, one a line")
    webhook.set_defaults(run=webhook_command)
    job = commands.add_parser("job", parents=[common], help="a script that annotates models on Hugging Face Jobs")
    job.add_argument("list", type=Path, metavar="LIST", help="a text file, one model a line")
    job.set_defaults(run=job_command)


def annotate_command(options: argparse.Namespace) -> None:
    """Annotate the models that the options name, shared by the ranks of a launcher, and tell of each. Raises
    `SourceError` if one failed."""
    from lmd_hf.run.world import join

    if options.quiet or options.json:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    world = join()
    models = world.gather(world.together(lambda: _models(options) if world.rank == 0 else []))[0]
    if options.to is not None:
        world.together(lambda: _edit_local(models, options) if world.rank == 0 else None)
        return world.leave()
    outcomes = []
    for outcome in _outcomes(models, options, world):
        outcomes.append(outcome)
        if not options.json:
            _tell(outcome, options)
    shares = world.gather(outcomes)
    world.leave()
    if world.rank == 0:
        places = {model: place for place, model in enumerate(models)}
        _conclude(sorted(chain(*shares), key=lambda outcome: places.get(outcome.model, -1)), options)


def _conclude(outcomes: "list[Outcome]", options: argparse.Namespace) -> None:
    """What became of all models, once they are done."""
    if options.json:
        print(json.dumps([_plain(outcome) for outcome in outcomes], indent=1, ensure_ascii=False))
    elif len(outcomes) > 1 and not options.quiet:
        print(_table(outcomes))
    if failed := [outcome for outcome in outcomes if outcome.status == "failed"]:
        told = f"{failed[0].model}: {failed[0].reason}"
        raise SourceError(
            told if len(outcomes) == 1 else f"{len(failed)} of {len(outcomes)} models failed, first {told}"
        )


def _models(options: argparse.Namespace) -> list[str]:
    from lmd_hf.hub.batch import listed, searched

    models = list(options.model)
    if options.from_file is not None:
        models += listed(options.from_file)
    if options.author or options.search:
        models += searched(author=options.author, search=options.search, limit=options.limit)
    if not models and options.queue is None:
        raise SettingsError("no model to annotate; name one, or give --from-file, --author, --search or --queue")
    return list(dict.fromkeys(models))


def _outcomes(models: list[str], options: argparse.Namespace, world: "World") -> "Iterator[Outcome]":
    """This rank's share, through the queue where one is named and something is written; a dry run leaves the queue as
    it is."""
    from lmd_hf.hub.batch import annotate_each, listed, work_off
    from lmd_hf.hub.queue import Queue

    how = "pull" if options.create_pr else "push" if options.push else "dry"
    skip = listed(options.skip_list) if options.skip_list is not None else []
    chosen: dict[str, Any] = {"how": how, "skip": skip, "force": options.force}
    if options.queue is None:
        return annotate_each(models, **chosen, world=world)
    queue = Queue(options.queue)
    if how != "dry":
        world.together(lambda: queue.add(models) if world.rank == 0 else 0)  # before any rank finds it empty
        return work_off(queue, **chosen)
    waiting = [entry.model for entry in queue.entries() if entry.state == "waiting"]
    return annotate_each(list(dict.fromkeys([*waiting, *models])), **chosen, world=world)


def _edit_local(models: list[str], options: argparse.Namespace) -> None:
    from lmd_hf.hub.annotate import annotate_file

    if len(models) != 1:
        raise SettingsError(f"--to edits one card, and {len(models)} models are named; give one")
    draft = annotate_file(models[0], options.to)
    for note in draft.notes:
        print(visible(f"note: {note}"), file=sys.stderr)
    if options.json:
        print(json.dumps({"model": models[0], "card": str(options.to), "marks": draft.marks, "notes": draft.notes}))
    elif not options.quiet:
        print(visible_lines(draft.diff()), end="")


def _tell(outcome: "Outcome", options: argparse.Namespace) -> None:
    """One model: its diff in a dry run, else a line on stderr."""
    address = f" {outcome.url}" if outcome.url else ""
    print(visible(f"{outcome.model}: {outcome.status}, {outcome.reason}{address}"), file=sys.stderr)
    if outcome.draft is not None:
        for note in outcome.draft.notes:
            print(visible(f"note: {note}"), file=sys.stderr)
        if outcome.status == "drafted" and not options.quiet:
            print(visible_lines(outcome.draft.diff()), end="")


def _table(outcomes: "list[Outcome]") -> str:
    from tabulate import tabulate

    rows = [(outcome.model, outcome.status, visible(outcome.reason)) for outcome in outcomes]
    return tabulate(rows, headers=("model", "status", "why"), disable_numparse=True)


def _plain(outcome: "Outcome") -> dict[str, Any]:
    draft = outcome.draft
    told = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome) if field.name != "draft"}
    return told | ({} if draft is None else {"diff": draft.diff(), "marks": draft.marks, "notes": list(draft.notes)})


def webhook_command(options: argparse.Namespace) -> None:
    """Serve until interrupted; WEBHOOK_SECRET holds the secret."""
    from lmd_hf.hub.batch import listed
    from lmd_hf.hub.queue import Queue
    from lmd_hf.hub.webhook import PATH, serving

    skip = listed(options.skip_list) if options.skip_list is not None else []
    chosen = {"how": "pull", "skip": skip}
    secret = os.environ.get("WEBHOOK_SECRET", "")
    queue = Queue(options.queue)
    asked = threading.Event()
    with serving(queue, secret=secret, host=options.host, port=options.port, options=chosen) as (port, ended):

        def stop(*_: object) -> None:
            asked.set()
            ended.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        address = f"http://{options.host}:{port}"
        told = {"webhook": f"{address}{PATH}", "status": f"{address}/status"}
        line = json.dumps(told) if options.json else f"webhooks: {told['webhook']}  status: {told['status']}"
        print(line, flush=True)
        ended.wait()
    if not asked.is_set():
        raise SourceError("the worker has stopped, so the server has too; see above, then start it again")


def job_command(options: argparse.Namespace) -> None:
    """Print the script, which mounts each model at the commit that it has now."""
    from lmd_hf.hub.batch import listed
    from lmd_hf.hub.job import pinned, script

    text = script(pinned(listed(options.list)))
    print(json.dumps({"script": text}) if options.json else text, end="\n" if options.json else "")
