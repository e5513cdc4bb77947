"""Low-rank estimators of a weight, by which SparseLoRA guesses which channels matter."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


def svd_estimator(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Rank-r factors of a linear's transposed weight, so that ``x @ a @ b`` estimates its output.

    ``W^T = P S Q^T``; ``a = P_r sqrt(S_r)`` and ``b = sqrt(S_r) Q_r^T`` (SparseLoRA, section 3.2).
    The SVD is randomised (Halko et al. 2011) with power iterations: the full one of a 4096 x 11008
    matrix takes minutes, and only a few singular vectors are wanted.

    Args:
        weight: float32 ``[out, in]``.
        rank: r, at least 1.
        seed: of the random test matrix.

    Returns:
        a bfloat16 ``[in, r]``, b bfloat16 ``[r, out]``, and the share of ``||W||_F^2`` that the
        exact factors of that rank keep.
    """
    size = min(weight.shape)
    rank = min(rank, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, singular, right = torch.svd_lowrank(
            weight.T, q=min(rank + _OVERSAMPLING, size), niter=_POWER_ITERATIONS
        )
    root = singular[:rank].sqrt()
    a = (left[:, :rank] * root).to(torch.bfloat16)
    b = (root[:, None] * right[:, :rank].T).to(torch.bfloat16)
    energy = singular[:rank].square().sum() / weight.square().sum().clamp(min=1e-30)
    return a.contiguous(), b.contiguous(), float(energy)
