"""`lmd-hf recipe lora | freeze | extract`: their options, and what they print and write."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd_hf.errors import SettingsError
from lmd_hf.options import add_settings, changed_settings, chosen_settings, refuse_for_saved
from lmd_hf.visible import visible


if TYPE_CHECKING:
    from lmd_hf.report.compare import Comparison
    from lmd_hf.report.report import Report

READ = ("metric", "roles", "layers", "match", "device", "data")  # the settings that a recipe may choose
FILTERS = ("roles", "layers", "match")  # those that a saved report can follow too
SELECTED = (*FILTERS, "device")


def add_recipe(commands: Any, common: argparse.ArgumentParser) -> Any:
    """Add the command to the parser's subcommands; returns its own, for further recipes."""
    from lmd_hf.records import Settings

    parser = commands.add_parser("recipe", help="adapter ranks, layers to train, adapters, smaller models")
    recipes = parser.add_subparsers(title="recipes", required=True, metavar="RECIPE")
    lora = recipes.add_parser("lora", parents=[common], help="a LoRA configuration: how many ranks each module gets")
    _add_model(lora, "a Hub id, a folder, a weight file, a report.json or a compare.json")
    how = lora.add_mutually_exclusive_group(required=True)
    how.add_argument("--budget", type=int, metavar="N", help="at most so many trainable parameters")
    how.add_argument("--energy", type=float, metavar="SHARE", help="of each module, the ranks that hold this share")
    lora.add_argument("--scale", type=float, default=2, help="α/r of every module (default: 2)")
    lora.add_argument("--tuned", metavar="MODEL", help="take the ranks of what changed from MODEL to this one")
    add_settings(lora, Settings, READ)
    lora.set_defaults(run=lora_command)
    freeze = recipes.add_parser("freeze", parents=[common], help="the layers to train: the most signal above noise")
    _add_model(freeze, "a Hub id, a folder, a weight file or a report.json")
    freeze.add_argument(
        "--share", type=float, default=0.5, help="of each role's layers, so many are trained (default: 0.5)"
    )
    add_settings(freeze, Settings, SELECTED)
    freeze.set_defaults(run=freeze_command)
    extract = recipes.add_parser("extract", parents=[common], help="the difference of two models as a LoRA adapter")
    for side, what in (("base", "the model before"), ("tuned", "the model after")):
        extract.add_argument(side, metavar=side.upper(), help=f"{what}: a Hub id, a folder or a weight file")
    extract.add_argument("--out", type=Path, metavar="DIR", required=True, help="write the PEFT repository there")
    extract.add_argument("--rank", type=int, metavar="N", help="at most so many ranks a module")
    extract.add_argument("--energy", type=float, metavar="SHARE", help="of each module, the ranks that hold this share")
    extract.add_argument(
        "--kernel", choices=("exact", "sketch"), default="exact", help="how factors are computed (default: exact)"
    )
    extract.set_defaults(run=extract_command)
    return recipes


def _add_model(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the recipe there, as JSON")


def lora_command(options: argparse.Namespace) -> None:
    """Print, and write, the configuration."""
    from tabulate import tabulate

    from lmd_hf.recipes.lora import lora_recipe

    _quieten(options)
    report, names = _measured(options)
    recipe = lora_recipe(
        report,
        budget=options.budget,
        energy=options.energy,
        roles=options.roles,
        scale=options.scale,
        model=names,
    )
    told = recipe.to_dict()
    _write(options, told)
    if options.json:
        facts = {
            "source": recipe.source, "trainable_parameters": recipe.parameters, "budget": recipe.budget,
            "left_out": recipe.left_out,
        }  # fmt: skip
        print(json.dumps(told | {"lmd": facts}, indent=2))
        return
    if not options.quiet:
        rows = [(visible(m.name), " × ".join(map(str, m.shape)), recipe.ranks[m.name]) for m in recipe.modules]
        print(tabulate(rows, headers=("module", "shape", "rank")))
    of = f" of {recipe.budget:,}" if recipe.budget is not None else ""
    _say(f"{recipe.parameters:,}{of} trainable parameters in {len(recipe.ranks)} modules")
    for name, reason in recipe.left_out.items():
        _say(f"left out: {name}: {reason}")


def freeze_command(options: argparse.Namespace) -> None:
    """Print the patterns as YAML, and write them."""
    from lmd_hf.recipes.freeze import freeze_recipe
    from lmd_hf.report.report import Report

    _quieten(options)
    report, names = _measured(options)
    if not isinstance(report, Report):
        raise SettingsError(f"{options.model}: a comparison; layers are chosen from one model: give its report")
    recipe = freeze_recipe(report, share=options.share, roles=options.roles, names=names)
    told = recipe.to_dict()
    _write(options, told)
    if options.json:
        print(json.dumps(told, indent=2))
    elif not options.quiet:
        print(recipe.to_yaml(), end="")
    chosen = sum(module.trained for module in recipe.modules)
    _say(f"{told['trained_parameters']:,} parameters in {chosen} of {len(recipe.modules)} modules to train")


def extract_command(options: argparse.Namespace) -> None:
    """Write the adapter, and tell how close it is."""
    from tabulate import tabulate

    from lmd_hf.recipes.extract import extract

    _quieten(options)
    made = extract(
        options.base, options.tuned, options.out, rank=options.rank, energy=options.energy, kernel=options.kernel
    )
    if options.json:
        print(json.dumps(made.to_dict(), indent=1, ensure_ascii=False))
    elif not options.quiet:
        rows = [(visible(m.module), m.rank, m.update_rank, f"{m.relative_error:.1e}") for m in made.modules]
        print(tabulate(rows, headers=("module", "rank", "update rank", "error / ‖ΔW‖"), disable_numparse=True))
    _say(f"wrote {options.out}/: {made.parameters:,} parameters in {len(made.modules)} modules")
    for name, reason in made.left_out.items():
        _say(f"left out: {name}: {reason}")
    for note in made.notes:
        _say(f"note: {note}")


def _measured(options: argparse.Namespace) -> "tuple[Report | Comparison, dict[str, str]]":
    """The saved report or comparison, or a new one; with the modules' names where the model is there."""
    from lmd_hf.api import analyze, compare
    from lmd_hf.recipes.modules import names_in
    from lmd_hf.records import Settings
    from lmd_hf.report.files import read_saved
    from lmd_hf.run.loading import refuse_factored
    from lmd_hf.weights.source import open_source

    tuned, read = getattr(options, "tuned", None), READ if hasattr(options, "metric") else SELECTED
    if tuned is None and (saved := read_saved(Path(options.model))) is not None:
        computed = tuple(name for name in read if name not in FILTERS)
        revision = ["revision"] if options.revision else []
        refuse_for_saved(options.model, revision + changed_settings(Settings, options, computed))
        return _selected(saved, options), {}
    source = open_source(options.model, revision=options.revision)
    refuse_factored(source)
    names = names_in(source)
    if tuned is None:
        return analyze(options.model, revision=options.revision, **chosen_settings(Settings, options, read)), names
    settings = Settings(**chosen_settings(Settings, options, SELECTED))
    return compare(options.model, tuned, base_revision=options.revision, settings=settings), names


def _selected(saved: "Report | Comparison", options: argparse.Namespace) -> "Report | Comparison":
    """With the matrices of the layers and names that are asked for; the recipe itself looks at the roles."""
    from lmd_hf.records import Settings
    from lmd_hf.run.plan import nothing_left, selector

    settings = Settings(layers=options.layers, match=options.match)
    rows: Any = tuple(filter(selector(saved.matrices, settings), saved.matrices))
    if not rows:
        raise nothing_left(settings)
    return replace(saved, matrices=rows)


def _quieten(options: argparse.Namespace) -> None:
    if options.quiet or options.json:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def _write(options: argparse.Namespace, told: dict[str, Any]) -> None:
    from lmd_hf.report.files import text_writer, write_folder

    if options.out is not None:
        write_folder(options.out.parent, {options.out.name: text_writer(json.dumps(told, indent=2) + "\n")})
        _say(f"wrote {options.out}")


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr)
