"""How many ranks each module gets: equal marginal gain, by a budget of parameters or a share of the energy. Pure.

Rank r+1 of module i adds the share g = σ²_{i,r+1} / Σ_j σ²_{ij} of its energy for out_i + in_i parameters.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from lmd_hf.errors import SettingsError
from lmd_hf.recipes.modules import Module


def shares(module: Module, *, relative: bool) -> np.ndarray:
    """What each further rank adds: σ², as a share of the module's own Σσ² where `relative`."""
    energies = module.values**2
    total = module.energy if relative else 1.0
    return energies / total if total > 0 else energies


def by_budget(modules: Sequence[Module], budget: int, *, relative: bool) -> dict[str, int]:
    """{module: rank}, at least 1 each: the next rank always goes where it adds most for each parameter that it costs.

    Gains fall with the rank, so no allocation of the same cost adds more as long as every next rank fits. What does not
    fit is passed over, and what remains is less than one rank of any module that could take one more. Raises
    `SettingsError` where the budget is below one rank for each module.
    """
    least = sum(module.unit for module in modules)
    if budget < least:
        raise SettingsError(
            f"the budget of {budget:,} parameters is below one rank for each of the {len(modules)} modules, which "
            f"takes {least:,}; raise it, or select fewer roles or layers"
        )
    ranks = {module.name: 1 for module in modules}
    gains = {module.name: shares(module, relative=relative) for module in modules}
    room = budget - least
    queue = [(-_gain(gains[m.name], 1, m.unit), place) for place, m in enumerate(modules) if m.most > 1]
    heapq.heapify(queue)
    while queue:
        _, place = heapq.heappop(queue)
        module = modules[place]
        if module.unit > room:
            continue  # nor will it later: room only shrinks
        ranks[module.name] += 1
        room -= module.unit
        if ranks[module.name] < module.most:
            heapq.heappush(queue, (-_gain(gains[module.name], ranks[module.name], module.unit), place))
    return ranks


def by_energy(modules: Sequence[Module], energy: float) -> dict[str, int]:
    """{module: the least rank that holds this share of Σσ²}, between 1 and the most that means something."""
    if not 0 < energy <= 1:
        raise SettingsError(f"energy is {energy}; give a share above 0, at most 1")
    ranks = {}
    for module in modules:
        held = np.cumsum(shares(module, relative=True))
        rank = np.searchsorted(held, energy * (1 - 1e-12)) + 1 if module.energy > 0 else 1
        ranks[module.name] = int(np.clip(rank, 1, module.most))
    return ranks


def _gain(shares_r: np.ndarray, rank: int, unit: int) -> float:
    """What one rank more adds for each parameter."""
    return float(shares_r[rank]) / unit
