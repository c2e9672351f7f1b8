"""`lmd-hf recipe truncate`: its options, and what it prints and writes. Torch is imported by the work alone."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd_hf.errors import OutputError
from lmd_hf.options import add_settings, chosen_settings
from lmd_hf.records import Settings
from lmd_hf.visible import visible


if TYPE_CHECKING:
    from lmd_hf.truncated.record import Truncation

METRICS = ("identity", "norm", "data", "fisher")
CHOSEN = ("roles", "data")  # of the settings


def add_truncate(recipes: Any, common: argparse.ArgumentParser) -> None:
    """Add the recipe to the subcommands of `recipe`."""
    parser = recipes.add_parser(
        "truncate", parents=[common], help="a smaller model: weights in factors, ranks by equal marginal loss"
    )
    parser.add_argument("model", metavar="MODEL", help="a Hub id or a folder in Hub layout")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="write the model there, a new folder")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--ratio", type=float, help="keep this share of the selected matrices' parameters")
    how.add_argument("--energy", type=float, help="keep this share of the energy Σs'² of every matrix")
    how.add_argument("--rank", type=int, help="keep so many axes of every matrix")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default="identity",
        help="what is kept best: W, W times the gain before it, the outputs over --dataset, or the predictions there "
        "(default: identity)",
    )
    parser.add_argument("--evaluate", metavar="DATASET", help="held-out text: measure the loss on it before and after")
    add_settings(parser, Settings, CHOSEN)
    parser.set_defaults(run=truncate_command)


def truncate_command(options: argparse.Namespace) -> None:
    """Truncate the model, save it and tell its sizes."""
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise OutputError(f"{options.out} is there already; give --out a new folder")
    if options.quiet or options.json:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    from lmd_hf.truncated.truncate import truncate

    chosen = chosen_settings(Settings, options, CHOSEN)
    data = chosen.pop("data")
    found = truncate(
        options.model,
        energy=options.energy,
        rank=options.rank,
        ratio=options.ratio,
        metric=options.metric,
        data=data if data is not None and data.dataset else None,
        evaluate=options.evaluate if None in (options.evaluate, data) else replace(data, dataset=options.evaluate),
        revision=options.revision,
        **chosen,
    )
    found.save_pretrained(options.out)
    print(f"wrote {options.out}/: {', '.join(sorted(path.name for path in options.out.iterdir()))}", file=sys.stderr)
    if options.json:
        from lmd_hf.report.plain import plain

        print(json.dumps(plain(found.truncation), indent=1, ensure_ascii=False))
    elif not options.quiet:
        print(_table(found.truncation))


def _table(truncation: "Truncation") -> str:
    from tabulate import tabulate

    rows = [
        (visible(each.name), f"{each.shape[0]} × {each.shape[1]}", each.rank, f"{each.energy:.1%}")
        for each in truncation.layers
    ]
    table = tabulate(rows, headers=("layer", "shape", "axes", "energy kept"), disable_numparse=True)
    (before, after), (first, last) = truncation.parameters, truncation.selected
    lines = [
        f"{len(truncation.layers)} matrices in factors, {len(truncation.left)} left as they are",
        f"parameters {before:,} → {after:,} ({after / before:.1%}), of the selected matrices {last / first:.1%}",
    ]
    if (loss := truncation.loss) is not None:
        told = f"{loss.before:.4f} → {loss.after:.4f} nats a token over {loss.tokens:,} tokens of {loss.dataset}"
        lines.append(f"loss {told}")
    return "\n".join([table, "", *lines])
