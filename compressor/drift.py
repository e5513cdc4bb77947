"""Weights that give the original's outputs on the inputs that the compressed model has.

Behind compressed blocks a linear reads x_hat where in the original it read x. Minimising
``||W x - W' x_hat||^2`` over W' gives ``W' = W + W P H^-1`` with the drift
``P = (2 / n) * sum (x - x_hat) x_hat^T`` (the asymmetric calibration of GPTAQ, Li et al. 2025,
arXiv:2504.02692). It is applied to the target before tables are fitted, so that Lloyd, rounding and
refit all aim at it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.compressor.hessian import (
    HessianAccumulator,
    damped_factor,
    settle_dead_columns,
)


class DriftAccumulator:
    """Sums the drift of inputs that some linears share, and their Hessian on the same tokens.

    The Hessian must be of exactly these tokens. A token with a massive activation that weighs more
    in P than in H would be corrected too far, and each block after it further still.
    """

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self._cross = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._hessian = HessianAccumulator(columns, device)
        self._tokens = 0

    def add(self, original: Tensor, compressed: Tensor) -> None:
        """Add the two models' inputs ``[..., columns]`` for the same tokens."""
        current = compressed.reshape(-1, compressed.shape[-1]).float()
        drift = original.reshape(current.shape).float() - current
        self._cross.addmm_(drift.T, current)
        self._hessian.add(current)
        self._tokens += current.shape[0]

    def correct(self, weights: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """The weights to aim at.

        Args:
            weights: float32 ``[out, columns]`` each.
            damping: share of the mean diagonal added to the Hessian, as a ridge.

        Returns:
            by the same names; the weights themselves where the Hessian could not be factored.
        """
        cross = self._cross.mul_(2.0 / max(self._tokens, 1))
        projected = {name: weight @ cross for name, weight in weights.items()}
        del self._cross, cross
        hessian = self._hessian.finish()
        settle_dead_columns(hessian)
        identity = torch.arange(hessian.shape[0], device=hessian.device)
        upper = damped_factor(hessian, identity, damping).upper
        if upper is None:
            return weights
        return {
            name: weight + (projected.pop(name) @ upper.T) @ upper
            for name, weight in weights.items()
        }
