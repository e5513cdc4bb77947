"""Which sparsity to give each layer, from what each would cost and save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One sparsity that a site can have.

    Attributes:
        sparsity: share of the channels left out.
        cost: what it does to the model with all else dense, never negative.
        saving: of the operations a context token takes, in any unit.
    """

    sparsity: float
    cost: float
    saving: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, float]:
    """Sparsities that save much and cost at most the budget, if costs add up.

    Greedy: again and again the step, from what a site has to something that saves more, that saves
    most for what it costs, as long as it fits.

    Args:
        choices: of each site by its name.
        budget: of the costs' sum.

    Returns:
        The sparsity of each site; 0 where it stays dense.
    """
    chosen = dict.fromkeys(choices, Choice(0.0, 0.0, 0.0))
    left = budget
    while True:
        steps = [
            (_worth(chosen[site], choice), site, choice)
            for site in sorted(choices)
            for choice in choices[site]
            if choice.saving > chosen[site].saving and choice.cost - chosen[site].cost <= left
        ]
        if not steps:
            return {site: choice.sparsity for site, choice in chosen.items()}
        _, site, choice = max(steps, key=lambda step: step[0])
        left -= choice.cost - chosen[site].cost
        chosen[site] = choice


def _worth(current: Choice, other: Choice) -> tuple[float, float]:
    gain, cost = other.saving - current.saving, other.cost - current.cost
    return (gain / cost if cost > 0 else float("inf")), gain
