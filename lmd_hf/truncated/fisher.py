"""What an error of a layer's outputs costs: the Fisher information of the model's predictions about them.

With labels drawn from the model's own probabilities, and g the gradient of their −ln p at the outputs y of a layer,
F = E[g·gᵀ], and outputs y + δ raise the divergence of the predictions by ½ δᵀFδ to second order (Amari 1998; sampled as
in Martens & Grosse 2015, arXiv 1503.05671, §2.1). No label is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lmd_hf.run.batches import Batches
from lmd_hf.run.loading import Batch, evaluating, forward


WIDEST = 8192  # outputs; F of more, such as a vocabulary's, is taken as a multiple of the identity
IGNORED = -100


def output_gradients(
    model: nn.Module, batches: Batches, outs: dict[str, int], *, whole: bool, limit: float
) -> dict[str, Tensor]:
    """{module: F (O × O) with `whole`, else tr F/O} of each module with so many outputs, float64, per prediction of the
    model, in as many passes as keep all F below `limit` bytes; nothing for a model without logits of several classes.
    Modules that do not run have no entry."""
    sizes = {name: 8 * width**2 if whole and width <= WIDEST else 8 for name, width in outs.items()}
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    found: dict[str, Tensor] = {}
    for group in groups:
        sums = _pass(model, batches, {name: whole and outs[name] <= WIDEST for name in group})
        if sums is None:
            return {}
        found |= sums
    return found


def _pass(model: nn.Module, batches: Batches, modules: dict[str, bool]) -> dict[str, Tensor] | None:
    sums: dict[str, Tensor] = {}
    predictions = 0
    handles = [
        model.get_submodule(name).register_forward_hook(_hook(sums, name, whole)) for name, whole in modules.items()
    ]
    bar = tqdm(range(len(batches)), desc="gradients of outputs", leave=False, delay=2, name="lmd_hf.truncate")
    try:
        with _differentiable(model):
            for index in bar:
                batch = batches[index]
                logits: Any = getattr(forward(model, batch), "logits", None)
                if not isinstance(logits, Tensor) or logits.shape[-1] < 2 or not logits.requires_grad:
                    return None
                labels = _drawn(logits.detach(), batch, index)
                predictions += int((labels != IGNORED).sum())
                loss = cross_entropy(logits.flatten(0, -2).float(), labels, reduction="sum", ignore_index=IGNORED)
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / max(predictions, 1) for name, value in sums.items()}


def _hook(sums: dict[str, Tensor], name: str, whole: bool) -> Any:
    def take(gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).to(torch.float64)
        added = rows.T @ rows if whole else rows.square().sum() / rows.shape[1]
        sums[name] = sums[name] + added if name in sums else added

    def watch(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        if output.requires_grad:
            output.register_hook(take)  # type: ignore[no-untyped-call]
            return None
        leaf = output.detach().requires_grad_()  # the graph begins here: no parameter has a gradient
        leaf.register_hook(take)  # type: ignore[no-untyped-call]
        return leaf.clone()  # what follows may write over it

    return watch


def _drawn(logits: Tensor, batch: Batch, index: int) -> Tensor:
    """One class for every prediction, from its probabilities and the batch's own seed; none at padding."""
    generator = torch.Generator().manual_seed(index)
    probabilities = logits.flatten(0, -2).float().softmax(-1).cpu()
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    if mask is not None and mask.numel() == len(labels):
        labels = labels.masked_fill(mask.flatten().to(labels.device) == 0, IGNORED)
    return labels


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with gradients of outputs but of no parameter."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
