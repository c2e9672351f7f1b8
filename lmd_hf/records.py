"""The frozen values that pass between the stages. No logic, no I/O, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


STACKS = ("", "vision", "audio", "text", "encoder", "decoder")  # in the order of the forward pass
ROLES = ("embed", "conv", "q", "k", "v", "kv", "o", "router", "gate", "up", "down", "ssm", "other", "head")
UNREAD = "could not be read"  # how the reason of a `Skipped` begins whose bytes did not come


@dataclass(frozen=True)
class WeightFile:
    """One weight file of a model. `sha256` is `None` where nobody has computed it yet."""

    name: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class ModelIdentity:
    """Which model, exactly. `revision` is what was asked for, `commit` what it was pinned to (`None` off the Hub);
    `subfolder` is the folder in it, and `base` the model that an adapter's updates were added to."""

    id: str
    revision: str | None
    commit: str | None
    model_type: str | None
    architectures: tuple[str, ...]
    files: tuple[WeightFile, ...]
    subfolder: str = ""
    base: str | None = None


@dataclass(frozen=True)
class TensorRef:
    """One stored tensor: where its bytes lie. `file` is "" for a live module; `start` and `stop` count from the
    beginning of the file; `dtype` is written as safetensors does (BF16, F32 …). `declared` is the class and the shape
    of the weight that it holds the values of, where the file's metadata name them (torchao). `unread` says why its
    entries cannot be read, where they cannot."""

    name: str
    file: str
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]
    declared: tuple[str, tuple[int, ...]] | None = None
    unread: str = ""


@dataclass(frozen=True)
class LowRank:
    """An update ΔW = scale · left · right of thin factors, left (out, r) and right (r, in). `magnitude` is DoRA's
    length of every row of the sum; `experts` > 1 says that so many experts' factors lie in the two tensors; `unfit`
    says why the two are no such factors."""

    left: TensorRef
    right: TensorRef
    scale: float
    magnitude: TensorRef | None = None
    experts: int = 1
    unfit: str = ""


@dataclass(frozen=True)
class Factored:
    """scale · left · right with tensors left (O × r) and right (r × I): a matrix that is never multiplied out."""

    left: Any
    right: Any
    scale: float


@dataclass(frozen=True)
class Weight:
    """One weight as the network knows it: the name and shape that its module gives it, however it is stored. `format`
    is `plain` for a tensor that is the weight, else the layout of `tensors`, the largest of them first: packed values,
    then scales, zero points and so on. `dtype` is that of the largest; `unread` says why they are no weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    tensors: tuple[TensorRef, ...]
    low_rank: LowRank | None = None
    unread: str = ""


@dataclass(frozen=True)
class NormRef:
    """The gain that feeds a matrix: γ = `offset` + the tensor (Gemma-style norms store γ − 1)."""

    tensor: TensorRef
    offset: float


@dataclass(frozen=True)
class MatrixRef:
    """One matrix of the network, y = W·x, and how to cut it out of what is stored.

    `shape` is (out, in). `tensors` hold the entries in the format `stored`, the largest first, whose name is `name`;
    `expert` picks along their first axis; `transposed` says that the weight is (in, out); `rows` are the slices
    (start, stop, step) of the out axis that belong to this matrix, all if empty. `activation` is the function after
    (gate, up) or before (down) it, `None` outside an MLP; `gated` says that a gate multiplies it. `tied_to` names a
    stored tensor that should hold the same numbers. `low_rank` is the matrix itself where `stored` is `lora`, else an
    update that is added to it."""

    name: str
    part: str
    stack: str
    block: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    dtype: str
    stored: str
    tensors: tuple[TensorRef, ...]
    rows: tuple[tuple[int, int, int], ...] = ()
    expert: int | None = None
    transposed: bool = False
    norm: NormRef | None = None
    activation: str | None = None
    gated: bool = False
    tied_to: str | None = None
    low_rank: LowRank | None = None


@dataclass(frozen=True)
class Skipped:
    """What was not decomposed, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Alias:
    """A name that stands for the same numbers as `of`. `stored` says that the checkpoint holds a second copy."""

    name: str
    of: str
    shape: tuple[int, ...]
    stored: bool


@dataclass(frozen=True)
class Inventory:
    """Every stored parameter of a model, once: selected + skipped + stored aliases add up to `parameters`.

    `config` is config.json, with transformers' own defaults filled in where its module tree was built."""

    selected: tuple[MatrixRef, ...]
    skipped: tuple[Skipped, ...]
    aliases: tuple[Alias, ...]
    parameters: int
    notes: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Data:
    """Which data the metric `data` comes from. Each field is an option of the command line."""

    dataset: str = field(
        default="",
        metadata={
            "help": "for --metric data: a Hub id, a .jsonl, .json, .parquet, .csv or .txt file, an image folder",
            "unset": "none",
        },
    )
    samples: int = field(default=512, metadata={"help": "so many examples of the dataset, drawn uniformly"})
    seq_len: int = field(default=128, metadata={"help": "longer texts are cut to so many tokens"})
    batch_size: int = field(default=8, metadata={"help": "examples in one forward pass"})
    graph: str = field(
        default="complete",
        metadata={
            "choices": ("complete", "knn"),
            "help": "of the metric: complete is the covariance, knn looks at nearest neighbours alone",
        },
    )
    neighbours: int = field(default=10, metadata={"help": "of each sample in a nearest-neighbour graph"})
    tokens: int = field(
        default=0,
        metadata={"help": "in the uniform sample that covariances use; 0: twice the widest input, at least 4,096"},
    )


@dataclass(frozen=True)
class Settings:
    """What to compute. Each field is a keyword of `analyze` and an option of the command line."""

    metric: str = field(
        default="identity",
        metadata={
            "choices": ("identity", "norm", "data"),
            "help": "identity: the spectrum of W; norm: of W times the gain of the norm that feeds it; data: of W "
            "in the metric of its inputs over a dataset",
        },
    )
    kernel: str = field(
        default="auto",
        metadata={
            "choices": ("auto", "exact", "sketch"),
            "help": "how spectra are computed; auto sketches where the short side is longer than 8,192",
        },
    )
    tolerance: float = field(
        default=0.01, metadata={"help": "of a sketch: half-width of the effective rank's interval, relative"}
    )
    roles: tuple[str, ...] = field(default=(), metadata={"help": "only these roles, such as q,k,down"})
    layers: str = field(default="", metadata={"help": "only these layers, such as 0-3,-1 (-1 is the last)"})
    match: str = field(default="", metadata={"help": "only tensors whose name fits this glob"})
    heads: bool = field(
        default=False, metadata={"help": "read every attention head as a Hopfield memory too: its QK and OV circuits"}
    )
    rank: int = field(
        default=0, metadata={"help": "write so many leading axes of every matrix as factors too, below --out"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, mps …; auto takes a GPU if there is one"})
    data: Data | None = field(default=None, metadata={"fields": Data})


@dataclass(frozen=True)
class Work:
    """One matrix to do: which kernel, what it will cost (floating-point operations, bytes in memory), and the tolerance
    of a sketch."""

    ref: MatrixRef
    kernel: str
    flops: float
    bytes: int
    tolerance: float = 0.01


@dataclass(frozen=True)
class Piece:
    """Rows start…stop of the long side of a matrix, `work` its place in the plan, whose part of the Gram product a rank
    makes for the matrix's owner."""

    work: int
    start: int
    stop: int


@dataclass(frozen=True)
class Estimate:
    """What a plan costs on one machine: bytes to fetch from the Hub, seconds of decomposition, bytes of memory. In the
    metric `data` also how often the model runs over the data, and the bytes of all that is gathered of its inputs."""

    fetch_bytes: int
    seconds: float
    memory_bytes: int
    passes: int | None = None
    input_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """What will be done, from headers alone. `shards[rank]` holds indices into `works`, most expensive first, and
    `pieces[rank]` what that rank sums of matrices that are cut, its own ones included.

    `estimate` depends on the machine and is `None` until it was measured there."""

    identity: ModelIdentity
    settings: Settings
    works: tuple[Work, ...]
    shards: tuple[tuple[int, ...], ...]
    pieces: tuple[tuple[Piece, ...], ...]
    skipped: tuple[Skipped, ...]
    aliases: tuple[Alias, ...]
    parameters: int
    notes: tuple[str, ...]
    estimate: Estimate | None = field(default=None, compare=False)


@dataclass(frozen=True)
class DataFigures:
    """What the data say of one matrix, beside its spectrum in their metric.

    `samples` rows of its input are in the metric, `graph_samples` in the nearest-neighbour graphs, which fall into so
    many `components` (of `input` and `output`). `energy` = Σs'², the mean squared length of W·x (about its mean where
    the layer has a bias); its standard error is relative, that of the participation ratio absolute. The two shares say
    how much of that energy the leading n' axes of S' carry, and of the plain singular value decomposition. `dimensions`
    holds {input, latent, output: {estimator: (intrinsic dimension, standard error)}}, `None` where samples are too few.
    """

    samples: int
    energy: float
    energy_error: float | None
    participation_ratio_error: float | None
    metric_share: float | None
    weights_share: float | None
    graph_samples: int
    components: dict[str, int | None]
    dimensions: dict[str, dict[str, tuple[float, float] | None]]


@dataclass(frozen=True)
class MatrixReport:
    """All numbers of one matrix. A number that does not apply is `None`.

    Norms, ranks and `singular_values` describe S', the spectrum in the metric used (σ(W) under `identity`);
    `numerical_rank` and the noise figures (`mp_…`) are always those of σ(W). `log_volume` is Σ ln σ over the leading
    `latent_dim` values. `singular_value_ranks` is `None` when
    `singular_values` holds the whole spectrum, else the 1-based ranks of the values that are kept.

    `kernel` is what was planned, `method` what ran. Where that is `krylov+quadrature`, `singular_values` are the
    leading ones, each within `error_bound` (relative), and `intervals` holds a 95 % interval for each number that is
    estimated from a sketched distribution; it is `None` where every number is exact to `error_bound`.

    In the metric `data`, `data` and `topology_spectrum` are there too (its ranks as those of the singular values), or
    `metric_note` says why the metric is another.
    """

    name: str
    part: str
    stack: str
    block: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    dtype: str
    stored: str
    kernel: str
    method: str
    error_bound: float
    frobenius_norm: float
    spectral_norm: float
    smallest_singular_value: float | None
    stable_rank: float | None
    participation_ratio: float | None
    effective_rank: float | None
    effective_rank_energy: float | None
    energy_rank_90: int | None
    energy_rank_95: int | None
    energy_rank_99: int | None
    numerical_rank: int
    latent_dim: int | None
    latent_dim_rule: str | None
    mp_edge: float | None
    mp_spikes: int | None
    mp_spikes_99: int | None
    mp_fit_distance: float | None
    energy_degree: int
    effective_degree: float | None
    capacity_log10: float | None
    expressivity: float | None
    metric: str
    singular_value_ranks: tuple[int, ...] | None
    singular_values: np.ndarray = field(compare=False, repr=False)
    intervals: dict[str, tuple[float, float]] | None = None
    log_volume: float | None = None
    metric_note: str | None = None
    data: DataFigures | None = None
    topology_spectrum: np.ndarray | None = field(default=None, compare=False, repr=False)
    topology_ranks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Coverage:
    """decomposed + skipped + stored aliases = `parameters`, always."""

    parameters: int
    decomposed: int
    fraction: float
    skipped: tuple[Skipped, ...]
    aliases: tuple[Alias, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """One of the paper's failure signatures: the measure, its threshold and the matrices that show it. `status` is
    `found`, `not found` or `not measured`."""

    signature: str
    status: str
    text: str
    measure: str
    threshold: float | None
    matrices: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """What execution hands to the report: rows in the order of the inventory, and what turned out to be no row."""

    matrices: tuple[MatrixReport, ...]
    skipped: tuple[Skipped, ...]
    aliases: tuple[Alias, ...]
    environment: dict[str, Any]
    timing: dict[str, float]
    notes: tuple[str, ...] = ()
