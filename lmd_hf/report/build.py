"""From a plan and its results to the report."""

import dataclasses
import math

from lmd_hf import __version__
from lmd_hf.circuits import Heads, MlpReport
from lmd_hf.evidence import Convergence
from lmd_hf.records import Coverage, MatrixReport, ModelIdentity, Plan, Results
from lmd_hf.report.findings import find
from lmd_hf.report.report import SCHEMA, Report
from lmd_hf.weights.inventory import pieces


NO_HEADS = Heads((), ())


def build_report(
    identity: ModelIdentity, plan: Plan, results: Results, *, convergence: Convergence, heads: Heads = NO_HEADS
) -> Report:
    """The report of one model; its coverage adds up to every stored parameter, or this raises `AssertionError`."""
    return Report(
        schema=SCHEMA,
        lmd_hf=__version__,
        model=identity,
        settings=dataclasses.asdict(plan.settings) | {"roles": list(plan.settings.roles)},
        coverage=_coverage(plan, results, heads),
        matrices=results.matrices,
        heads=heads.rows,
        findings=find(results.matrices, verdict=convergence.verdict),
        convergence=convergence,
        environment=results.environment,
        timing={stage: round(seconds, 3) for stage, seconds in results.timing.items()},
        mlps=_with_capacity(heads.mlps, results.matrices),
    )


def _with_capacity(mlps: tuple[MlpReport, ...], matrices: tuple[MatrixReport, ...]) -> tuple[MlpReport, ...]:
    """An MLP stores by its keys: degree and capacity are those of its up matrix."""
    rows = {(matrix.name, matrix.part): matrix for matrix in matrices}
    return tuple(
        dataclasses.replace(mlp, energy_degree=keys.energy_degree, capacity_log10=keys.capacity_log10)
        if (keys := rows.get(mlp.keys)) is not None
        else mlp
        for mlp in mlps
    )


def _coverage(plan: Plan, results: Results, heads: Heads) -> Coverage:
    skipped = plan.skipped + results.skipped
    aliases = plan.aliases + results.aliases
    stored = {(work.ref.name, work.ref.part): pieces(work.ref) for work in plan.works}
    decomposed = sum(math.prod(shape) for m in results.matrices for _, shape in stored[m.name, m.part])
    passed = sum(math.prod(s.shape) for s in skipped) + sum(math.prod(a.shape) for a in aliases if a.stored)
    assert decomposed + passed == plan.parameters, "every stored parameter must be accounted for"
    fraction = decomposed / plan.parameters if plan.parameters else 0.0
    return Coverage(
        plan.parameters, decomposed, fraction, skipped, aliases, (*plan.notes, *results.notes, *heads.notes)
    )
