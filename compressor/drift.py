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
    ACCUMULATED_TOKENS,
    HessianAccumulator,
    damped_cholesky,
    settle_dead_columns,
)


class DriftAccumulator:
    """Sums the drift of inputs that some linears share."""

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self._cross = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._tokens = 0

    def add(self, original: Tensor, compressed: Tensor) -> None:
        """Add the two models' inputs ``[..., columns]`` for the same tokens."""
        width = compressed.shape[-1]
        pairs = (
            tensor.reshape(-1, width).split(ACCUMULATED_TOKENS) for tensor in (original, compressed)
        )
        for wanted, given in zip(*pairs, strict=True):
            current = given.float()
            self._cross.addmm_((wanted.float() - current).T, current)
            self._tokens += current.shape[0]

    def correct(
        self, weights: dict[str, Tensor], inputs: HessianAccumulator, damping: float
    ) -> dict[str, Tensor]:
        """The weights to aim at; nothing may be added afterwards.

        Args:
            weights: float32 ``[out, columns]`` each.
            inputs: of exactly the tokens that the drift was seen on. A token with a massive
                activation that weighs more in P than in H would be corrected too far, and each
                block after it further still.
            damping: share of the mean diagonal added to the Hessian, as a ridge.

        Returns:
            by the same names; the weights themselves where the Hessian could not be factored.
        """
        cross = self._cross.mul_(2.0 / max(self._tokens, 1))
        projected = {name: weight @ cross for name, weight in weights.items()}
        del self._cross, cross  # before the factor: each is as large as all weights together

        def settled() -> Tensor:
            hessian = inputs.mean()
            settle_dead_columns(hessian)
            return hessian

        lower, _, _ = damped_cholesky(settled, damping)
        if lower is None:
            return weights
        return {
            name: weight + torch.cholesky_solve(projected.pop(name).T, lower).T
            for name, weight in weights.items()
        }
