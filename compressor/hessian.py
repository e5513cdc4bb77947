"""The Hessian of a layer's output error, and the factor that rounding needs of its inverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DAMPING_RAISES = 6
# Activations are made float32 so many tokens at a time.
ACCUMULATED_TOKENS = 512


class HessianAccumulator:
    """``H = (2 / n) * sum over tokens of x x^T`` in float32, for linears that share an input."""

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs ``[..., columns]``."""
        for part in inputs.reshape(-1, inputs.shape[-1]).split(ACCUMULATED_TOKENS):
            flat = part.float()
            self._sum.addmm_(flat.T, flat)
            self._tokens += flat.shape[0]

    def mean(self) -> Tensor:
        """The Hessian of what was added so far, float32 ``[columns, columns]``, a copy."""
        return self._sum * (2.0 / max(self._tokens, 1))

    def finish(self) -> Tensor:
        """float32 ``[columns, columns]``; nothing may be added afterwards."""
        return self._sum.mul_(2.0 / max(self._tokens, 1))


@dataclass(frozen=True)
class DampedFactor:
    """What :func:`damped_factor` found.

    Attributes:
        upper: float32 ``[columns, columns]``, upper triangular, ``H^-1 = upper^T upper`` for the
            damped Hessian; None when every damping failed.
        damping: share of the mean diagonal that was added in the end.
        raises: how often the damping had to be raised.
    """

    upper: Tensor | None
    damping: float
    raises: int


def settle_dead_columns(hessian: Tensor) -> Tensor:
    """Give inputs that never fire a unit diagonal, in place.

    Returns:
        bool ``[columns]``: the dead columns; their weights do not matter and are set to zero.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    return dead


def damped_factor(hessian: Tensor, order: Tensor, damping: float) -> DampedFactor:
    """Factor the inverse of ``H + damping * mean(diag H) * I``, its columns taken in ``order``.

    With the columns in reverse order, H = L L^T; reversed back, L^-1 is the upper factor U with
    H^-1 = U^T U. One Cholesky and one triangular inverse, where the usual route (Cholesky, inverse,
    Cholesky) does twice the work and needs one more matrix.

    When the Cholesky fails the damping is raised tenfold, up to six times.

    Args:
        hessian: float32 ``[columns, columns]``.
        order: int64 ``[columns]``, a permutation.
        damping: share of the mean diagonal.
    """
    reverse = order.flip(0)
    lower, share, raises = damped_cholesky(
        lambda: hessian[reverse[:, None], reverse[None, :]], damping
    )
    if lower is None:
        return DampedFactor(None, share, raises)
    inverse = torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return DampedFactor(inverse.flip(0, 1), share, raises)


def damped_cholesky(
    make_hessian: Callable[[], Tensor], damping: float
) -> tuple[Tensor | None, float, int]:
    """Lower Cholesky factor of the damped Hessian; the damping it took and how often that was
    raised (see :func:`damped_factor`). None where every try failed.

    Args:
        make_hessian: gives float32 ``[columns, columns]`` that the factor may overwrite.
        damping: share of the mean diagonal.
    """
    share = damping
    for raises in range(MAX_DAMPING_RAISES + 1):
        if raises:
            share = share * 10 if share > 0 else 1e-4
        lower = make_hessian()
        diagonal = lower.diagonal()
        diagonal.add_(share * diagonal.mean())
        failed = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if int(failed) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return lower, share, raises
        del lower
    return None, share, MAX_DAMPING_RAISES
