"""Universal Hopfield networks: attention, nearest neighbours, energies, and layers and heads as networks."""

import math

import models
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lmd_hf import decompose
from lmd_hf.errors import SettingsError
from lmd_hf.layers import UniversalHopfield
from lmd_hf.layers.hopfield import SEPARATIONS, SIMILARITIES
from lmd_hf.matrix.hopfield import ov_circuit, qk_circuit
from lmd_hf.matrix.metrics import dense, norm


N, WIDTH, OUT = 12, 9, 7
SOFT = [("dot", "softmax"), ("euclidean", "softmax"), ("dot", "max"), ("euclidean", "max")]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(*shape, seed=0):
    return torch.where(draw(*shape, seed=seed) < 0, -1.0, 1.0).double()


def test_attention_is_dot_and_softmax():
    q, k, v = draw(2, 3, 5, WIDTH), draw(2, 3, N, WIDTH, seed=1), draw(2, 3, N, OUT, seed=2)
    ours = UniversalHopfield("dot", "softmax", beta=WIDTH**-0.5)(q, k, v)
    torch.testing.assert_close(ours, scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_sharp_softmax_finds_the_nearest_memory(similarity):
    memory, query = draw(N, WIDTH), draw(20, WIDTH, seed=1)
    sharp = UniversalHopfield(similarity, "softmax", memory=memory, beta=1e6)(query)
    hard = UniversalHopfield(similarity, "max", memory=memory)(query)
    torch.testing.assert_close(sharp, hard, rtol=0, atol=1e-9)
    distances = {
        "dot": -query @ memory.T,
        "cosine": -query @ memory.T / memory.norm(dim=1),
        "euclidean": torch.cdist(query, memory),
        "manhattan": torch.cdist(query, memory, p=1.0),
    }
    assert torch.equal(hard, memory[distances[similarity].argmin(1)])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarities_are_what_they_say(similarity):
    memory, query = draw(N, WIDTH), draw(3, WIDTH, seed=1)
    told = {
        "dot": lambda m, q: (m * q).sum(),
        "cosine": lambda m, q: (m * q).sum() / (m.norm() * q.norm()),
        "euclidean": lambda m, q: -((m - q) ** 2).sum() / 2,
        "manhattan": lambda m, q: -(m - q).abs().sum(),
    }[similarity]
    expected = torch.stack([torch.stack([told(m, q) for m in memory]) for q in query])
    torch.testing.assert_close(UniversalHopfield(similarity, memory=memory).similar(query), expected)


def test_identity_and_polynomial_are_powers():
    memory, query, written = draw(N, WIDTH), draw(3, WIDTH, seed=1), draw(N, OUT, seed=2)
    torch.testing.assert_close(
        UniversalHopfield("dot", "identity", written, memory=memory)(query), query @ memory.T @ written
    )
    cubic = UniversalHopfield("cosine", "polynomial", written, memory=memory, degree=3)
    torch.testing.assert_close(cubic(query), cubic.similar(query) ** 3 @ written)


@pytest.mark.parametrize(("similarity", "separation"), SOFT)
def test_energy_falls_with_every_step(similarity, separation):
    network = UniversalHopfield(similarity, separation, memory=2 * draw(N, WIDTH), beta=0.7)
    state = 3 * draw(50, WIDTH, seed=1)
    energy = network.energy(state)
    first = energy
    for _ in range(10):
        state = network.retrieve(state)
        assert (network.energy(state) <= energy + 1e-12).all()
        energy = network.energy(state)
    assert (energy < first - 0.1).float().mean() > 0.9


@pytest.mark.parametrize(("separation", "degree"), [("identity", 1), ("polynomial", 3), ("polynomial", 5)])
def test_energy_of_binary_states_falls_with_every_step(separation, degree):
    network = UniversalHopfield("dot", separation, memory=signs(8, 60), degree=degree)
    state = signs(50, 60, seed=1)
    first = energy = network.energy(state)
    for _ in range(5):
        state = network.retrieve(state)
        assert (network.energy(state) <= energy + 1e-9 * energy.abs()).all()
        energy = network.energy(state)
    assert (energy < first).all()


def test_the_gradient_of_the_energy_is_the_step():
    """q − ∇E(q) is the answer, of dot + softmax (Ramsauer et al. 2020) and, without the length, of the others."""
    memory, query = draw(N, WIDTH), draw(4, WIDTH, seed=1).requires_grad_()
    for name, own in (("softmax", 1.0), ("identity", 0.0), ("polynomial", 0.0)):
        network = UniversalHopfield("dot", name, memory=memory, beta=0.8, degree=3)
        (slope,) = torch.autograd.grad(network.energy(query).sum(), query)
        torch.testing.assert_close(own * query - slope, network(query))


def test_the_classical_network_recalls_from_a_damaged_pattern():
    memory = signs(4, 120)
    damaged = memory.clone()
    damaged[:, :12] *= -1
    network = UniversalHopfield("dot", "identity", memory=memory)
    assert torch.equal(network.retrieve(damaged, steps=3), memory)
    weights = memory.T @ memory  # the textbook: sign(W x)
    assert torch.equal(network.retrieve(damaged), (damaged @ weights).sign())


def test_a_network_without_an_energy_says_so():
    for similarity, separation in (("cosine", "softmax"), ("manhattan", "max"), ("euclidean", "identity")):
        with pytest.raises(SettingsError, match=f"{similarity} and {separation} has no known energy; known"):
            UniversalHopfield(similarity, separation, memory=draw(N, WIDTH)).energy(draw(1, WIDTH))
    with pytest.raises(SettingsError, match="with a projection or gains of its own"):
        UniversalHopfield("dot", "softmax", draw(N, OUT), memory=draw(N, WIDTH)).energy(draw(1, WIDTH))
    with pytest.raises(SettingsError, match="degree 2 has no energy"):
        UniversalHopfield("dot", "polynomial", memory=draw(N, WIDTH)).energy(draw(1, WIDTH))


def test_bad_choices_are_refused():
    with pytest.raises(SettingsError, match="no similarity 'near'; known: dot, euclidean, manhattan, cosine"):
        UniversalHopfield("near")
    with pytest.raises(SettingsError, match="no separation 'sparsemax'; known: identity, polynomial, softmax, max"):
        UniversalHopfield("dot", "sparsemax")
    with pytest.raises(SettingsError, match="minus a distance"):
        UniversalHopfield("euclidean", "polynomial")
    with pytest.raises(SettingsError, match="holds no memory"):
        UniversalHopfield()(draw(1, WIDTH))
    assert set(SEPARATIONS) == {"identity", "polynomial", "softmax", "max"}


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("metric", ["identity", "norm", "dense"])
def test_similarity_separation_and_projection_of_a_layer_are_the_layer(metric, rank):
    w, x, half = draw(OUT, WIDTH), draw(6, WIDTH, seed=1), draw(WIDTH, WIDTH, seed=2)
    metrics = {"identity": None, "norm": norm(torch.rand(WIDTH) + 0.5), "dense": dense(half @ half.T)}
    lmd = decompose(w, input_metric=metrics[metric], rank=rank)
    network = UniversalHopfield.from_lmd(lmd)
    torch.testing.assert_close(network(x), x @ lmd.reconstruct().T, rtol=1e-9, atol=1e-11)
    in_turn = network.separate(network.similar(x))
    torch.testing.assert_close(in_turn, (x @ lmd.similarity.T) * lmd.s_K)
    if rank is None:
        torch.testing.assert_close(network(x), x @ w.T, rtol=1e-8, atol=1e-9)


def test_a_head_as_a_network_answers_as_attention_does():
    """The last token of a model's own attention, which sees all others."""
    torch.manual_seed(0)
    attention = models.make("bert").double().bert.encoder.layer[0].attention.self
    states, w_o = draw(8, models.H), draw(models.H, 8, seed=1)
    rows = slice(8, 16)  # head 1
    w = {n: getattr(attention, n).weight.detach()[rows] for n in ("query", "key", "value")}
    qk, ov = qk_circuit(w["query"], w["key"], 8**-0.5), ov_circuit(w_o, w["value"])
    network = UniversalHopfield.from_head(states, qk, ov)
    for name in ("query", "key", "value"):
        torch.nn.init.zeros_(getattr(attention, name).bias)
    expected = attention(states[None])[0][0][:, rows] @ w_o.T
    torch.testing.assert_close(network(states), expected, rtol=1e-9, atol=1e-11)


def test_a_network_is_a_module():
    network = UniversalHopfield("dot", "softmax", draw(N, OUT), memory=draw(N, WIDTH), beta=math.pi)
    assert network.float()(draw(2, WIDTH).float()).dtype == torch.float32
    assert set(network.state_dict()) == {"memory", "projection"}
    assert str(network) == "UniversalHopfield(similarity=dot, separation=softmax, memories=12)"
    assert "separation=gains" in str(UniversalHopfield.from_lmd(decompose(draw(OUT, WIDTH))))
