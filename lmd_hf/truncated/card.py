"""The card of a truncated model: pure text from its record and the base's own card."""

import re
from typing import Any

import yaml
from tabulate import tabulate

from lmd_hf import __version__
from lmd_hf.truncated.record import Truncation


INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
GOALS = {
    "ratio": "{1:.6g}% of the parameters of the selected matrices, given out over them by equal marginal loss",
    "energy": "{1:.6g}% of the energy Σs'² of every matrix",
    "rank": "{0:g} axes of every matrix",
}
METRICS = {
    "identity": "of the weights (plain singular value decomposition)",
    "norm": "of the weights times the gain of the norm that feeds them",
    "data": "of the inputs that the matrices see over {data}, so that the error of their outputs there is the least",
    "fisher": "of their inputs over {data}, and of what an error of each output costs there (Fisher information)",
}
FRONT = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---", re.DOTALL)


def card_text(truncation: Truncation, base_card: str | bytes | None = None) -> str:
    """The Markdown of README.md. It tells a loss only where one was measured, and claims no quality."""
    base = truncation.base
    is_hub_id = "/" in base  # names of folders are without their path
    metadata: dict[str, Any] = {
        **_inherited(base_card),
        "library_name": "lmd-hf",
        "tags": ["lmd", "low-rank"],
        **({"base_model": base} if is_hub_id else {}),
    }
    before, after = truncation.parameters
    first, last = truncation.selected
    ((target, value),) = truncation.target.items()
    known = f"[{base}](https://huggingface.co/{base})" if is_hub_id else f"`{base}`"
    at = f" at commit `{truncation.commit}`" if truncation.commit else ""
    data = "a data set" if truncation.data is None else f"`{truncation.data}`"
    rows = [
        ("parameters", f"{before:,} → {after:,} ({after / before:.1%})"),
        ("of these in the selected matrices", f"{first:,} → {last:,} ({last / first:.1%})"),
        ("matrices in factors", f"{len(truncation.layers)}; {len(truncation.left)} stay whole"),
        ("kept", GOALS[target].format(value, 100 * value)),
        ("metric", f"{truncation.metric}: that " + METRICS[truncation.metric].format(data=data)),
    ]
    return (
        "\n\n".join(
            [
                f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
                f"# {base.rpartition('/')[2]}, truncated",
                f"{known}{at}, with weight matrices W cut to the leading axes of their Layer Matrix Decomposition "
                "W ≈ U·Odist·S'·Idist·Vᵀ ([arXiv 2309.05968](https://arxiv.org/abs/2309.05968)) and stored as two thin "
                f"matrices and S', by lmd_hf {__version__}. Nothing was trained after that.",
                tabulate(rows, headers=("", ""), tablefmt="github"),
                _loss(truncation),
                "## Load it",
                "```python\nfrom lmd_hf import LMDModel\n\n"
                'model = LMDModel.from_pretrained("…")  # this repository; runs as its base does\n'
                "dense = model.merge()  # the dense model of transformers again\n```",
                "## Layers",
                tabulate(
                    _layers(truncation), headers=("layer", "shape", "axes", "energy kept", "metric"), tablefmt="github"
                ),
            ]
        )
        + "\n"
    )


def _loss(truncation: Truncation) -> str:
    loss = truncation.loss
    if loss is None:
        return "What the truncation costs was not measured: no claim about quality is made here."
    return (
        f"Loss, mean −ln p of a token, over {loss.tokens:,} tokens of `{loss.dataset}`: "
        f"**{loss.before:.4f}** before, **{loss.after:.4f}** after. Nothing else was measured."
    )


def _layers(truncation: Truncation) -> list[tuple[str, str, int, str, str]]:
    rows = []
    for layer in truncation.layers:
        size = f"{layer.shape[0]} × {layer.shape[1]}"
        rows.append((f"`{layer.name}`", size, layer.rank, f"{layer.energy:.1%}", layer.metric))
    return rows


def _inherited(card: str | bytes | None) -> dict[str, Any]:
    """What the base's card says that is true of its truncation too: the licence, the language, the task."""
    text = card.decode(errors="replace") if isinstance(card, bytes) else card or ""
    found = FRONT.match(text)
    try:
        values = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return {}
    return {name: values[name] for name in INHERITED if name in values} if isinstance(values, dict) else {}
