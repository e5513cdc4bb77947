"""The Hessian of a layer's output error, and the factor that rounding needs of its inverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spallm_serve.compressor import native

MAX_DAMPING_RAISES = 6
# Activations are made float32 so many tokens at a time.
_ACCUMULATED_TOKENS = 512
# Matrices as large as a Hessian are turned over in place, so many rows at a time.
_PANEL = 256


class HessianAccumulator:
    """``H = (2 / n) * sum over tokens of x x^T`` in float32, for linears that share an input."""

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        # Below the diagonal it is right only after it was mirrored.
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs ``[..., columns]``."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        add_products(self._sum, flat, flat)
        self._tokens += len(flat)

    def sums(self) -> Tensor:
        """The sum over the tokens added so far, float32 ``[columns, columns]``, not a copy."""
        return _mirrored(self._sum)

    def mean(self) -> Tensor:
        """The Hessian of the tokens added so far, float32 ``[columns, columns]``, a copy."""
        return self.sums() * (2.0 / max(self._tokens, 1))

    def finish(self) -> Tensor:
        """float32 ``[columns, columns]``; nothing may be added afterwards."""
        return self.sums().mul_(2.0 / max(self._tokens, 1))


def add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a^T b``; where ``a is b`` only what is at or above the diagonal is right then.

    Args:
        total: float32 ``[columns, columns]``.
        a, b: floating point ``[tokens, columns]``.
    """
    if native.multiplies(a) and native.multiplies(b):
        native.add_products(a.contiguous(), b.contiguous(), total)
        return
    for left, right in zip(a.split(_ACCUMULATED_TOKENS), b.split(_ACCUMULATED_TOKENS), strict=True):
        total.addmm_(left.float().T, right.float())


def _mirrored(upper: Tensor) -> Tensor:
    """Copy what is above the diagonal below it, in place."""
    for start in range(0, len(upper), _PANEL):
        panel = upper[start : start + _PANEL]
        own = panel[:, start : start + _PANEL]
        own.copy_(own.triu() + own.triu(1).T)
        upper[start + _PANEL :, start : start + _PANEL] = panel[:, start + _PANEL :].T
    return upper


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
    return DampedFactor(_turned_round(inverted_lower(lower)), share, raises)


def inverted_lower(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix in place, from the right a panel of columns at a time.

    With the corner beyond a panel inverted already, the panel below its own triangle D becomes
    ``-corner @ panel @ D^-1``.
    """
    identity = torch.eye(min(_PANEL, len(lower)), dtype=lower.dtype, device=lower.device)
    for start in reversed(range(0, len(lower), _PANEL)):
        own, below = slice(start, start + _PANEL), slice(start + _PANEL, None)
        width = len(lower[own])
        triangle = torch.linalg.solve_triangular(
            lower[own, own], identity[:width, :width], upper=False
        )
        lower[below, own] = lower[below, below] @ lower[below, own] @ -triangle
        lower[own, own] = triangle
    return lower


def _turned_round(matrix: Tensor) -> Tensor:
    """Reverse the order of rows and of columns in place."""
    flat = matrix.view(-1)
    half, step = flat.numel() // 2, _PANEL * len(matrix)
    for start in range(0, half, step):
        stop = min(start + step, half)
        front, back = flat[start:stop], flat[flat.numel() - stop : flat.numel() - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return matrix


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
        if _factored(lower):
            return lower, share, raises
        del lower
    return None, share, MAX_DAMPING_RAISES


def _factored(matrix: Tensor) -> bool:
    """Replace a symmetric matrix by its lower Cholesky factor, a panel of columns at a time.

    LAPACK's would need a second matrix for its order of columns.

    Returns:
        False where the matrix is not positive definite or not finite; it is spoiled then.
    """
    for start in range(0, len(matrix), _PANEL):
        own, below = slice(start, start + _PANEL), slice(start + _PANEL, None)
        done = matrix[:, :start]
        triangle, failed = torch.linalg.cholesky_ex(matrix[own, own] - done[own] @ done[own].T)
        if int(failed) or not bool(torch.isfinite(triangle.diagonal()).all()):
            return False
        matrix[own, own] = triangle
        matrix[own, below] = 0
        panel = matrix[below, own].addmm_(done[below], done[own].T, alpha=-1)
        panel.copy_(torch.linalg.solve_triangular(triangle.T, panel, upper=True, left=False))
    return True
