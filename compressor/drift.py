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
    add_products,
    damped_cholesky,
    inverted_lower,
    settle_dead_columns,
)

# Rows of a weight that are corrected at a time.
_CHUNK_ROWS = 128


class DriftAccumulator:
    """Sums the drift of inputs that some linears share.

    Args:
        inputs: of the compressed model; fed here, so that both see exactly the same tokens. A token
            with a massive activation that weighs more in P than in H would be corrected too far,
            and each block after it further still.
    """

    def __init__(self, inputs: HessianAccumulator, columns: int, device: torch.device) -> None:
        self._inputs = inputs
        self._cross = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._tokens = 0

    def add(self, original: Tensor, compressed: Tensor) -> None:
        """Add the two models' inputs ``[..., columns]`` for the same tokens."""
        columns = compressed.shape[-1]
        add_products(self._cross, original.reshape(-1, columns), compressed.reshape(-1, columns))
        self._tokens += compressed.numel() // columns
        self._inputs.add(compressed)

    def corrected(self, weights: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """The weights to aim at; nothing may be added afterwards.

        Where the Hessian cannot be factored these are the given ones.

        Args:
            weights: floating point ``[out, columns]`` each.
            damping: share of the mean diagonal added to the Hessian, as a ridge.

        Returns:
            float32 ``[out, columns]`` by name, not views of the given.
        """
        # The sum over (x - x_hat) x_hat^T, as the difference of two.
        drift = self._cross.sub_(self._inputs.sums()).mul_(2.0 / max(self._tokens, 1))
        projected = {name: weight.float() @ drift for name, weight in weights.items()}
        del self._cross, drift  # before the factor: each is as large as all weights together

        def settled() -> Tensor:
            hessian = self._inputs.mean()
            settle_dead_columns(hessian)
            return hessian

        lower, _, _ = damped_cholesky(settled, damping)
        if lower is None:
            return {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        inverse = inverted_lower(lower)
        for name, weight in weights.items():
            for part, change in zip(
                weight.split(_CHUNK_ROWS), projected[name].split(_CHUNK_ROWS), strict=True
            ):
                change.copy_(torch.addmm(part.float(), change @ inverse.T, inverse))
        return projected
