"""A plan as text and as JSON types."""

import math
from collections import Counter
from typing import Any

from tabulate import tabulate

from lmd_hf.records import Estimate, MatrixRef, Plan
from lmd_hf.report.text import percent, reasons
from lmd_hf.visible import visible
from lmd_hf.weights.inventory import pieces


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """What would be done, what would not and why, as JSON types."""
    return {
        "model": {
            "id": plan.identity.id,
            "revision": plan.identity.revision,
            "commit": plan.identity.commit,
            "model_type": plan.identity.model_type,
        },
        "parameters": plan.parameters,
        "decomposed": _planned(plan),
        "flops": sum(work.flops for work in plan.works),
        "bytes_to_fetch": plan.estimate.fetch_bytes if plan.estimate else None,
        "expected_seconds": float(f"{plan.estimate.seconds:.3g}") if plan.estimate else None,
        "memory_bytes": plan.estimate.memory_bytes if plan.estimate else None,
        "passes": plan.estimate.passes if plan.estimate else None,
        "input_bytes": plan.estimate.input_bytes if plan.estimate else None,
        "largest_bytes": max((work.bytes for work in plan.works), default=0),
        "matrices": [
            {
                "name": work.ref.name,
                "part": work.ref.part,
                "stack": work.ref.stack,
                "block": work.ref.block,
                "role": work.ref.role,
                "layer": work.ref.layer,
                "shape": list(work.ref.shape),
                "dtype": work.ref.dtype,
                "stored": work.ref.stored,
                "kernel": work.kernel,
                "norm": work.ref.norm.tensor.name if work.ref.norm else None,
                "flops": work.flops,
                "bytes": work.bytes,
            }
            for work in plan.works
        ],
        "skipped": [{"name": s.name, "shape": list(s.shape), "reason": s.reason} for s in plan.skipped],
        "aliases": [{"name": a.name, "of": a.of, "shape": list(a.shape), "stored": a.stored} for a in plan.aliases],
        "notes": list(plan.notes),
    }


def plan_to_text(plan: Plan, *, brief: bool = False) -> str:
    """Lines of totals, costs and the coverage to expect, and one row for each role and shape."""
    flops = sum(work.flops for work in plan.works)
    lines = [
        f"{visible(plan.identity.id)}: {len(plan.works)} matrices, {_planned(plan):,} of {plan.parameters:,} "
        f"parameters ({percent(_planned(plan) / plan.parameters if plan.parameters else 0)}), {flops / 1e9:,.1f} GFLOP",
        *([_costs(plan.estimate)] if plan.estimate else []),
        *(visible(f"note: {note}") for note in plan.notes),
    ]
    if plan.skipped:
        lines.append(visible(f"skipped: {reasons(plan.skipped)}"))
    if not brief:
        refs = [(work.ref, work.kernel) for work in plan.works]
        rows = Counter((r.stack, r.block, r.role, r.shape, _stored(r), kernel) for r, kernel in refs)
        table = [
            (" ".join(filter(None, (stack, block, role))), f"{shape[0]} × {shape[1]}", count, stored, kernel)
            for (stack, block, role, shape, stored, kernel), count in rows.items()
        ]
        lines += ["", tabulate(table, headers=("role", "shape", "matrices", "stored as", "kernel"))]
    return "\n".join(lines)


def _costs(estimate: Estimate) -> str:
    fetched = f"{estimate.fetch_bytes / 1e6:,.1f} MB" if estimate.fetch_bytes else "nothing"
    seconds = f"{estimate.seconds:,.0f} s" if estimate.seconds >= 1 else "a second or less"
    costs = f"to fetch: {fetched}; here about {seconds} and {estimate.memory_bytes / 1e6:,.0f} MB of memory"
    if estimate.passes is None or estimate.input_bytes is None:
        return costs
    times = "once" if estimate.passes == 1 else f"{estimate.passes} times"
    return f"{costs}; the model runs {times} over the data, and its inputs take {estimate.input_bytes / 1e6:,.0f} MB"


def _stored(ref: MatrixRef) -> str:
    return ref.dtype if ref.stored == "plain" else f"{ref.stored} ({ref.dtype})"


def _planned(plan: Plan) -> int:
    return sum(math.prod(shape) for work in plan.works for _, shape in pieces(work.ref))
