"""Universal Hopfield Networks: z = P · sep(sim(M, q)) (Millidge et al. 2022, arXiv 2202.04557).

Shapes: N = memories, I = width of queries and memories, O = width of what is written; leading axes are batches.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot, softmax

from lmd_hf.errors import SettingsError
from lmd_hf.matrix.lmd import LMD
from lmd_hf.records import Factored


def _dot(query: Tensor, memory: Tensor) -> Tensor:
    return query @ memory.mT


def _cosine(query: Tensor, memory: Tensor) -> Tensor:
    return _dot(normalize(query, dim=-1), normalize(memory, dim=-1))


def _euclidean(query: Tensor, memory: Tensor) -> Tensor:
    half = query.square().sum(-1, keepdim=True) / 2 + memory.square().sum(-1).unsqueeze(-2) / 2
    return _dot(query, memory) - half


def _manhattan(query: Tensor, memory: Tensor) -> Tensor:
    return -torch.cdist(query, memory, p=1.0)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dot": _dot,
    "euclidean": _euclidean,
    "manhattan": _manhattan,
    "cosine": _cosine,
}
SEPARATIONS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "identity": lambda scores, beta, degree: scores,
    "polynomial": lambda scores, beta, degree: scores**degree,
    "softmax": lambda scores, beta, degree: softmax(beta * scores, dim=-1),
    "max": lambda scores, beta, degree: one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype),
}
BINARY = ("identity", "polynomial")  # separations whose networks have states ±1: a step takes the sign


class UniversalHopfield(nn.Module):
    """An associative memory, z = P · sep(sim(M, q)), of any similarity and separation.

    `similarity`: `dot` m·q, `cosine`, `euclidean` −½‖m − q‖², `manhattan` −‖m − q‖₁ (the paper's code takes reciprocals
    of distances, which order the memories alike but diverge at one). `separation`: `identity`, `polynomial` (to the
    power `degree`), `softmax` (of β times the similarity), `max` (1 for the most similar memory, 0 for the others: the
    limit β → ∞), or a vector that multiplies the similarities, such as S'. `projection` P (N × O) is what each memory
    writes, by default the `memory` (N × I) itself. Both may be given with each call instead.
    dot + softmax with β = 1/√I is attention, dot + identity with signs the classical Hopfield network.

    Raises `SettingsError` for unknown names, and for a polynomial of distances, which are negative.

    >>> memory = torch.eye(3)
    >>> UniversalHopfield("dot", "max", memory=memory)(torch.tensor([[0.2, 0.9, 0.1]]))
    tensor([[0., 1., 0.]])
    """

    memory: Tensor | None
    projection: Tensor | None
    gain: Tensor | None

    def __init__(
        self,
        similarity: str = "dot",
        separation: str | Tensor = "softmax",
        projection: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        beta: float = 1.0,
        degree: int = 2,
    ) -> None:
        super().__init__()
        named = "identity" if isinstance(separation, Tensor) else separation
        for kind, value, known in (("similarity", similarity, SIMILARITIES), ("separation", named, SEPARATIONS)):
            if value not in known:
                raise SettingsError(f"no {kind} '{value}'; known: {', '.join(known)}")
        if named == "polynomial" and similarity in ("euclidean", "manhattan"):
            raise SettingsError(
                f"'{similarity}' is minus a distance, which has no order-keeping power; take softmax or max"
            )
        self.similarity, self.separation, self.beta, self.degree = similarity, named, beta, degree
        self.register_buffer("memory", memory)
        self.register_buffer("projection", projection)
        self.register_buffer("gain", separation if isinstance(separation, Tensor) else None)

    def forward(self, query: Tensor, memory: Tensor | None = None, projection: Tensor | None = None) -> Tensor:
        """What the memories answer to queries (… × Q × I): (… × Q × O)."""
        memory = self._memory(memory)
        projection = projection if projection is not None else self.projection
        return self.separate(self.similar(query, memory)) @ (memory if projection is None else projection)

    def similar(self, query: Tensor, memory: Tensor | None = None) -> Tensor:
        """sim(M, q): (… × Q × N)."""
        return SIMILARITIES[self.similarity](query, self._memory(memory))

    def separate(self, scores: Tensor) -> Tensor:
        """sep of similarities (… × N)."""
        return (
            scores * self.gain
            if self.gain is not None
            else SEPARATIONS[self.separation](scores, self.beta, self.degree)
        )

    def retrieve(self, query: Tensor, *, steps: int = 1) -> Tensor:
        """`steps` steps from the queries, each answer the next query. With `identity` and `polynomial` states are ±1,
        and a step is the sign of the answer."""
        for _ in range(steps):
            answer = self(query)
            query = torch.where(answer < 0, -1.0, 1.0).to(answer.dtype) if self.separation in BINARY else answer
        return query

    def energy(self, query: Tensor) -> Tensor:
        """The energy (… × Q) that `retrieve` never raises, of a network whose memories write themselves.

        dot: softmax ½‖q‖² − β⁻¹ log Σ exp(β m·q) (Ramsauer et al. 2020, eq. 2, without its constants), max
        ½‖q‖² − max m·q; identity −½Σ(m·q)², polynomial −Σ(m·q)^{p+1}/(p+1) of degree p (Krotov & Hopfield 2016, eq. 1,
        n = p + 1), on states ±1 for odd p. euclidean: softmax −β⁻¹ log Σ exp(−β‖m − q‖²/2), max ½ min‖m − q‖².
        Raises `SettingsError` for a network that has none.
        """
        if self.projection is not None or self.gain is not None or (self.similarity, self.separation) not in _ENERGIES:
            kind = f"{self.similarity} and {self.separation}"
            why = " with a projection or gains of its own" if (self.similarity, self.separation) in _ENERGIES else ""
            known = ", ".join(" + ".join(pair) for pair in _ENERGIES)
            raise SettingsError(f"{kind}{why} has no known energy; known for memories that write themselves: {known}")
        if self.separation == "polynomial" and self.degree % 2 == 0:
            raise SettingsError(f"degree {self.degree} has no energy that its steps lower; odd degrees have")
        return _ENERGIES[self.similarity, self.separation](self, query)

    def _memory(self, given: Tensor | None) -> Tensor:
        memory = given if given is not None else self.memory
        if memory is None:
            raise SettingsError("this network holds no memory; give it one, here or when it is made")
        return memory

    def extra_repr(self) -> str:
        """The choices, for printing."""
        stored = "" if self.memory is None else f", memories={len(self.memory)}"
        return (
            f"similarity={self.similarity}, separation={'gains' if self.gain is not None else self.separation}{stored}"
        )

    @classmethod
    def from_lmd(cls, lmd: LMD) -> "UniversalHopfield":
        """A decomposed layer: similarity Idist·Vᵀ (latent coordinates of the query), separation S', projection U·Odist.
        Applied in turn they are W'x."""
        return cls("dot", lmd.s_K, lmd.projection.T, memory=lmd.similarity)

    @classmethod
    def from_head(cls, states_NJ: Tensor, qk: Factored, ov: Factored) -> "UniversalHopfield":
        """An attention head over the tokens `states_NJ` (N × J): a query x of the stream answers with what the head
        writes, W_O W_V X softmax(X B x), unmasked and at zero offset. `qk` (s·W_Kᵀ W_Q) and `ov` (W_O W_V) are its
        circuits as products of thin factors (`lmd_hf.matrix.hopfield`)."""
        states = states_NJ.to(qk.left.dtype)
        memory_NI = (states @ qk.left) @ qk.right
        written_NO = (states @ ov.right.T) @ ov.left.T * ov.scale
        return cls("dot", "softmax", written_NO, memory=memory_NI, beta=qk.scale)


def _soft(network: UniversalHopfield, query: Tensor) -> Tensor:
    return -torch.logsumexp(network.beta * network.similar(query), dim=-1) / network.beta


def _hard(network: UniversalHopfield, query: Tensor) -> Tensor:
    return -network.similar(query).amax(-1)


def _power(network: UniversalHopfield, query: Tensor) -> Tensor:
    order = 2 if network.separation == "identity" else network.degree + 1
    return -(network.similar(query) ** order).sum(-1) / order


def _with_length(
    energy: Callable[[UniversalHopfield, Tensor], Tensor],
) -> Callable[[UniversalHopfield, Tensor], Tensor]:
    return lambda network, query: energy(network, query) + query.square().sum(-1) / 2


_ENERGIES: dict[tuple[str, str], Callable[[UniversalHopfield, Tensor], Tensor]] = {
    ("dot", "softmax"): _with_length(_soft),
    ("dot", "max"): _with_length(_hard),
    ("dot", "identity"): _power,
    ("dot", "polynomial"): _power,
    ("euclidean", "softmax"): _soft,
    ("euclidean", "max"): _hard,
}
