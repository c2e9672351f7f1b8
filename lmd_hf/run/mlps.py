"""The key–value reading of every MLP, one at a time."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lmd_hf.circuits import MlpRef, MlpReport
from lmd_hf.errors import FormatError, NoDataError, SourceError
from lmd_hf.matrix.hopfield import fold
from lmd_hf.records import UNREAD, MatrixRef
from lmd_hf.run.workers import count_workers, single_torch_threads, worker_pool
from lmd_hf.run.world import World
from lmd_hf.weights.mlps import mlp_matrices
from lmd_hf.weights.source import Source
from lmd_hf.weights.stored import read_gain, read_matrix


Outcome = MlpReport | str  # a row, or why there is none


def measure_mlps(
    mlps: tuple[MlpRef, ...], source: Source, *, folded: bool, world: World | None = None
) -> tuple[tuple[MlpReport, ...], tuple[str, ...]]:
    """(a row for each MLP, in their order; notes on those that cannot be done), the same on every rank. `folded`: keys
    with the gains of the norms before them."""
    outcomes = (world or World()).shared_out(mlps, lambda mine: _measured(mine, source, folded))
    rows = tuple(outcome for outcome in outcomes if isinstance(outcome, MlpReport))
    return rows, tuple(outcome for outcome in outcomes if isinstance(outcome, str))


def _measured(mlps: list[MlpRef], source: Source, folded: bool) -> list[Outcome]:
    sizes = [sum(8 * math.prod(ref.shape) for ref in mlp_matrices(mlp)) for mlp in mlps]
    with single_torch_threads(), worker_pool(max(1, count_workers(sizes, torch.device("cpu"))), len(mlps)) as pool:
        return list(pool.map(lambda mlp: measure_mlp(mlp, source, folded=folded), mlps))


def measure_mlp(mlp: MlpRef, source: Source, *, folded: bool) -> Outcome:
    """The row of one MLP, or why there is none."""
    try:
        keys_FI, gates_FI = _rows(mlp.up, source, folded), None if mlp.gate is None else _rows(mlp.gate, source, folded)
        values_FO = read_matrix(source, mlp.down).to(torch.float64).T
    except (SourceError, FormatError) as error:
        return f"keys and values of '{mlp.down.name}' {UNREAD}: {error}"
    except (NoDataError, ValueError) as error:
        return f"keys and values of '{mlp.down.name}' left out: {error}"
    if not all(bool(each.isfinite().all()) for each in (keys_FI, gates_FI, values_FO) if each is not None):
        return f"keys and values of '{mlp.down.name}' left out: the matrices hold NaN or infinity"
    key, value = _norms(keys_FI), _norms(values_FO)
    gate = (None, None) if gates_FI is None else _norms(gates_FI)
    return MlpReport(
        name=mlp.down.name,
        stack=mlp.down.stack,
        layer=mlp.down.layer,
        block=mlp.down.block,
        part=mlp.down.part,
        neurons=len(values_FO),
        activation=mlp.down.activation,
        key_norm=key[0],
        key_norm_spread=key[1],
        gate_norm=gate[0],
        gate_norm_spread=gate[1],
        value_norm=value[0],
        value_norm_spread=value[1],
        key_value_cosine=_cosine(keys_FI, values_FO),
        gate_value_cosine=None if gates_FI is None else _cosine(gates_FI, values_FO),
        chance=1 / math.sqrt(values_FO.numel()),
        norm_folded=folded and mlp.up.norm is not None,
        keys=(mlp.up.name, mlp.up.part),
    )


def _rows(ref: MatrixRef, source: Source, folded: bool) -> Tensor:
    gain = read_gain(source, ref) if folded else None
    return fold(read_matrix(source, ref), gain)


def _norms(vectors_FN: Tensor) -> tuple[float, float]:
    """(median length, standard deviation over the mean) of the rows."""
    lengths = torch.linalg.vector_norm(vectors_FN, dim=1)
    mean = lengths.mean().item()
    return lengths.quantile(0.5).item(), lengths.std(correction=0).item() / mean if mean > 0 else 0.0


def _cosine(keys_FN: Tensor, values_FN: Tensor) -> float | None:
    """The mean of cos(kᵢ, vᵢ); `None` between streams of different widths, and where every vector is 0."""
    if keys_FN.shape != values_FN.shape or not keys_FN.any() or not values_FN.any():
        return None
    return cosine_similarity(keys_FN, values_FN, dim=1, eps=1e-300).mean().item()
