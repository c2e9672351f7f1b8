"""The command line: `lmd-hf demo | plan | analyze | compare | card | annotate | …`, torch only where needed."""

import argparse
import contextlib
import dataclasses
import errno
import gc
import io
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from lmd_hf import __version__
from lmd_hf.compat import rank
from lmd_hf.errors import LmdError, OutputError, ProcessError, SettingsError, SourceError
from lmd_hf.experiments.command import add_reproduce
from lmd_hf.hub.command import add_annotate
from lmd_hf.options import add_settings, changed_settings, chosen_settings, refuse_for_saved
from lmd_hf.recipes.command import add_recipe
from lmd_hf.truncated.command import add_truncate
from lmd_hf.visible import visible, visible_lines


EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 130
INTERRUPTED = "lmd-hf: interrupted; nothing half done was written, what was finished is kept"
GRACE_SECONDS = 2.0
FACTORS = "factors"  # the folder below --out
WHERE = ("revision", "subfolder", "download", "base")  # of a model
COMPARED = ("roles", "layers", "match", "device")  # the settings that mean something for two models


def main() -> NoReturn:
    """Run the command in `sys.argv` and end the process with its exit code."""
    gc.set_threshold(200_000)  # importing makes no garbage, and looking for it takes a fifth of the time
    signal.signal(signal.SIGINT, interrupt)
    for name in ("stdout", "stderr"):  # which a shell may have closed (`>&-`)
        setattr(sys, name, getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # half a UTF-16 pair in a name: its escape is JSON's own
    code = run()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # taking the imported libraries apart one object at a time would take another second


def interrupt(*_: object) -> None:
    """Raise `KeyboardInterrupt`, and end the process soon after if that is lost: Python drops what is raised inside a
    destructor or a weak reference's callback, of which importing makes thousands."""
    timer = threading.Timer(GRACE_SECONDS, lambda: os._exit(_say(INTERRUPTED, EXIT_INTERRUPTED)))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a known error in one line, 2 bad usage, 130 interrupted."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stopped:  # argparse has printed help, the version, or what is wrong with the usage
        return int(stopped.code or 0)
    if rank() and not getattr(options, "shared", False):  # several processes were started, and one is enough
        return EXIT_DONE
    debug = os.environ.get("HF_DEBUG", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        options.run(options)
        sys.stdout.flush()
    except LmdError as error:
        if debug:
            raise
        return _say(f"lmd-hf: {error}", EXIT_ERROR, alone=isinstance(error, ProcessError))
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        return EXIT_DONE
    except OSError as error:
        if debug or error.errno != errno.ENOSPC:
            raise
        return _say(f"lmd-hf: cannot write the output ({error.strerror}); free some space", EXIT_ERROR)
    except KeyboardInterrupt:
        if debug:
            raise
        return _say(INTERRUPTED, EXIT_INTERRUPTED)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmd-hf", description="See every weight matrix of a Hugging Face model as five readable factors."
    )
    parser.add_argument("--version", action="version", version=f"lmd_hf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable output on stdout, all else on stderr")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no table")
    model, several = (argparse.ArgumentParser(add_help=False, parents=[common]) for _ in range(2))
    named: dict[str, Any] = {"metavar": "MODEL", "help": "a Hub id, a folder in Hub layout or a weight file"}
    model.add_argument("model", **named)
    several.add_argument("model", nargs="+", **named)
    for named_models in (model, several):
        named_models.add_argument("--revision", help="branch, tag or commit of a Hub id")
        named_models.add_argument("--subfolder", default="", help="folder inside the repository or folder")
        named_models.add_argument(
            "--base", help="of a LoRA adapter: decompose this base with it added (auto: the one it names)"
        )
        add_settings(named_models, _settings())
    judged = argparse.ArgumentParser(add_help=False)
    verdict = judged.add_argument_group("the verdict on convergence")
    verdict.add_argument(
        "--before", metavar="MODEL", help="an earlier checkpoint: a folder, a Hub id, id@revision or @revision"
    )
    add_settings(verdict, _thresholds())
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.json, matrices.parquet and figures there"
    )

    demo = commands.add_parser("demo", parents=[common, written], help="the embedded model, end to end, offline")
    demo.set_defaults(run=_demo)
    plan = commands.add_parser("plan", parents=[model], help="what would be done, from headers alone")
    plan.set_defaults(run=_plan)
    fetched = argparse.ArgumentParser(add_help=False)
    fetched.add_argument("--download", action="store_true", help="keep whole weight files in the Hub's cache")
    fetched.add_argument(
        "--reuse", metavar="DATASET", help="take the result of this commit that the dataset holds, if any"
    )
    analyze = commands.add_parser(
        "analyze", parents=[several, fetched, judged, written], help="decompose every matrix of a model, or of several"
    )
    analyze.set_defaults(run=_analyze, shared=True)
    compare = commands.add_parser("compare", parents=[common], help="what changed from one model to another")
    compare.set_defaults(run=_compare)
    for side, what in (("base", "the model before"), ("tuned", "the model after")):
        compare.add_argument(side, metavar=side.upper(), help=f"{what}: a Hub id, a folder or a .safetensors file")
        compare.add_argument(f"--{side}-revision", help=f"branch, tag or commit of {side.upper()}, a Hub id")
    add_settings(compare, _settings(), COMPARED)
    compare.add_argument(
        "--out", type=Path, metavar="DIR", help="write compare.json, compare.parquet, card.md and figures there"
    )
    cache = commands.add_parser("cache", parents=[common], help="spectra kept from earlier runs: list or clear them")
    cache.add_argument("action", choices=("list", "clear"))
    cache.add_argument("model", nargs="?", default="", metavar="MODEL", help="clear only this model's")
    cache.set_defaults(run=_cache)
    card = commands.add_parser(
        "card",
        parents=[model, fetched, judged],
        help="the model-card section, of a model, a report.json or a compare.json",
    )
    card.set_defaults(run=_card)
    add_annotate(commands, common)
    add_reproduce(commands, common)
    add_truncate(add_recipe(commands, common), common)
    return parser


def _settings() -> Any:
    from lmd_hf.records import Settings

    return Settings


def _thresholds() -> Any:
    from lmd_hf.evidence import Thresholds

    return Thresholds


def _chosen_settings(options: argparse.Namespace) -> dict[str, Any]:
    return chosen_settings(_settings(), options)


def _demo(options: argparse.Namespace) -> None:
    from lmd_hf.api import analyze
    from lmd_hf.weights.source import EMBEDDED_ID

    options.out = options.out or Path("lmd-demo")
    _check_out(options.out)
    _begin(options)
    _finish(analyze(EMBEDDED_ID), options)


def _analyze(options: argparse.Namespace) -> None:
    from lmd_hf.run.world import join

    _begin(options)
    world = join(options.device)
    if options.rank < 0:
        raise SettingsError(f"--rank is {options.rank}; give how many axes to write, or 0 for none")
    if options.rank > 0 and options.out is None:
        raise SettingsError("--rank writes factors, and needs a folder for them: give --out DIR")
    if options.out is not None:
        world.together(lambda: _check_out(options.out))
    if len(options.model) > 1:
        _analyze_several(options, world)
    else:
        factors = options.out / FACTORS if options.rank > 0 else None
        report = _run_analysis(options, options.model[0], world=world, factors=factors)
        if world.rank == 0:
            _finish(report, options)
    world.leave()


def _run_analysis(options: argparse.Namespace, model: str, **shared: Any) -> Any:
    from lmd_hf.api import analyze

    return analyze(model, **_where(options), **_chosen_settings(options), **shared)


def _where(options: argparse.Namespace) -> dict[str, Any]:
    named = {name: getattr(options, name) for name in (*WHERE, "before", "reuse")}
    return named | {"thresholds": _thresholds()(**chosen_settings(_thresholds(), options))}


def _analyze_several(options: argparse.Namespace, world: Any) -> None:
    """Every model into a folder of its own below --out, as soon as it is done; one that fails stops no other."""
    from lmd_hf.pipeline import Request, analyze_each
    from lmd_hf.records import Settings
    from lmd_hf.report.files import is_written
    from lmd_hf.report.report import Report
    from lmd_hf.run.journal import folder_name

    mine = {}
    folders = [options.out and options.out / folder_name(name) for name in options.model]
    if options.out is not None and (twice := [name for name, count in Counter(folders).items() if count > 1]):
        raise SettingsError(f"several of the models would be written to {twice[0]}; analyse them one by one")
    factors = [folder / FACTORS for folder in folders] if options.rank > 0 else None
    asked = _where(options)
    where = {name: asked.pop(name) for name in WHERE}
    request = Request(Settings(**_chosen_settings(options)), where, **asked)
    for index, outcome in analyze_each(options.model, request, world, factors=factors):
        written = isinstance(outcome, Report) and options.out is not None
        mine[index] = _written(folders[index], outcome) if written else outcome
    shares = world.gather(mine)
    if world.rank > 0:
        return
    done = {index: outcome for share in shares for index, outcome in share.items()}
    if options.out is not None:
        reports = [(i, outcome) for i, outcome in done.items() if isinstance(outcome, Report)]
        done |= {i: _written(folders[i], report) for i, report in reports if not is_written(folders[i], report)}
    failed = [f"{options.model[i]}: {error}" for i, error in sorted(done.items()) if isinstance(error, LmdError)]
    named = [(options.model[i], report) for i, report in sorted(done.items()) if isinstance(report, Report)]
    if options.json:
        print(json.dumps([report.to_dict() for _, report in named], indent=1, ensure_ascii=False))
    elif not options.quiet:
        print("\n\n".join(f"{visible(name)}\n{report.summary()}" for name, report in named))
    for line in failed:
        _say(f"lmd-hf: {line}")
    if failed:
        raise SourceError(f"{len(failed)} of {len(done)} models failed; the others are done")
    for _, report in named:
        _check_complete(report)


def _written(folder: Path, report: Any) -> Any:
    """The report, or why it could not be written."""
    try:
        _write_report(folder, report)
    except OutputError as error:
        return error
    return report


def _finish(report: Any, options: argparse.Namespace) -> None:
    """Write the files if a folder was named, then print the report."""
    if options.out is not None:
        _write_report(options.out, report)
    _show(report, options)


def _write_report(folder: Path, report: Any) -> None:
    from lmd_hf.report.files import HEADS_PARQUET, report_writers
    from lmd_hf.report.plots import FIGURES, figures

    _write(folder, report, report_writers(report), figures(report), own=[HEADS_PARQUET, *FIGURES])


def _write(folder: Path, report: Any, writers: dict[str, Any], figures: dict[str, Any], own: Any) -> None:
    """The data files, the card and the figures of a report or a comparison, and no other of its `own` files."""
    from lmd_hf.report.files import text_writer, write_folder
    from lmd_hf.report.plots import writer

    pictures = {f"{name}.png": writer(figure) for name, figure in figures.items()}
    write_folder(folder, {**writers, "card.md": text_writer(report.card()), **pictures}, own=own)
    _say(f"wrote {folder}/: {', '.join([*writers, 'card.md', *pictures])}")


def _show(report: Any, options: argparse.Namespace) -> None:
    if options.json:
        print(report.to_json(), end="")
    elif not options.quiet:
        print(f"{report.table()}\n\n{report.summary()}")
    _check_complete(report)


def _check_complete(report: Any) -> None:
    """What is there has been printed; that some is missing ends the command with an error all the same."""
    if report.unread:
        raise SourceError(f"{len(report.unread)} matrices {report.unread[0].reason}; the report has the others")


def _plan(options: argparse.Namespace) -> None:
    from lmd_hf.api import plan
    from lmd_hf.records import Settings
    from lmd_hf.report.plan_text import plan_to_dict, plan_to_text

    _begin(options)
    todo = plan(
        options.model,
        revision=options.revision,
        subfolder=options.subfolder,
        base=options.base,
        settings=Settings(**_chosen_settings(options)),
    )
    print(json.dumps(plan_to_dict(todo), indent=1) if options.json else plan_to_text(todo, brief=options.quiet))


def _compare(options: argparse.Namespace) -> None:
    from lmd_hf.api import compare
    from lmd_hf.records import Settings

    if options.out is not None:
        _check_out(options.out)
    _begin(options)
    comparison = compare(
        options.base,
        options.tuned,
        base_revision=options.base_revision,
        tuned_revision=options.tuned_revision,
        settings=Settings(**{name: getattr(options, name) for name in COMPARED}),
    )
    if options.out is not None:
        from lmd_hf.report.files import comparison_writers
        from lmd_hf.report.plots import COMPARISON_FIGURES, comparison_figures

        writers, figures = comparison_writers(comparison), comparison_figures(comparison)
        _write(options.out, comparison, writers, figures, own=COMPARISON_FIGURES)
    _show(comparison, options)


def _card(options: argparse.Namespace) -> None:
    from lmd_hf.report.files import read_saved

    _begin(options)
    report = read_saved(Path(options.model))
    if report is None:
        report = _run_analysis(options, options.model)
    else:
        changed = changed_settings(_settings(), options) + changed_settings(_thresholds(), options)
        refuse_for_saved(options.model, [n for n in (*WHERE, "before", "reuse") if getattr(options, n)] + changed)
    text = report.card()
    print(json.dumps({"card": text}) if options.json else visible_lines(text), end="\n" if options.json else "")
    _check_complete(report)


def _cache(options: argparse.Namespace) -> None:
    from lmd_hf.run.journal import clear_kept, list_kept

    if options.action == "list" and options.model:
        raise SettingsError("`cache list` lists every model; leave out MODEL")
    kept = list_kept() if options.action == "list" else clear_kept(options.model)
    if options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in kept], indent=1))
        return
    for entry in kept:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.changed))
        print(f"{visible(entry.model)}  {entry.matrices} matrices  {entry.bytes / 1e6:.1f} MB  {when}")
    if not options.quiet:
        verb = "kept" if options.action == "list" else "removed"
        _say(f"{sum(entry.bytes for entry in kept) / 1e6:.1f} MB of {len(kept)} models {verb}")


def _check_out(folder: Path) -> None:
    """Fail before hours of work, not after: the output folder must take a file."""
    from lmd_hf.report.files import write_folder

    if os.path.exists(folder) and not os.path.isdir(folder):  # those of Path raise for a name that is too long
        raise OutputError(f"{folder} is a file; give --out a folder")
    write_folder(folder, {})


def _begin(options: argparse.Namespace) -> None:
    """Say that work has begun (importing torch and transformers alone takes seconds), or silence every bar."""
    if not options.quiet:
        if sys.stderr.isatty():
            named = getattr(options, "model", getattr(options, "tuned", "the embedded model"))
            _say(f"lmd-hf: reading {named if isinstance(named, str) else ', '.join(named)} …")
        return
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


def _say(text: str, code: int = EXIT_DONE, *, alone: bool = False) -> int:
    if alone or rank() == 0:  # of several processes one speaks: what goes wrong on a rank ends all, and rank 0 says it
        print(visible(text), file=sys.stderr)
    return code
