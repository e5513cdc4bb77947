"""Better tables for given codes and better codes for given tables, under the full Hessian.

The objective of a row is ``(w_hat - w) H (w_hat - w)^T``, the layer's output error on the
calibration tokens. Least squares for the tables and cyclic coordinate descent for the codes are the
two half-steps of LNQ (Kim et al., GuidedQuant, arXiv:2505.07004, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.compressor.rounding import BLOCK_COLUMNS, TransposedTables
from spallm_serve.kernels.reference import dequantize

_RELATIVE_TOLERANCE = 1e-12
_CHUNK_WEIGHTS = 1 << 18


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """``diag((W_hat - W) H (W_hat - W)^T)``: float32 ``[rows]``."""
    difference = approximation - weight
    return ((difference @ hessian) * difference).sum(dim=1)


def refit_tables(
    weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor, steps: int | None = None
) -> Tensor:
    """Least-squares tables for given codes: minimise :func:`output_error` over the entries.

    The normal equations of a row, ``P^T H P c = P^T H w`` with P the one-hot codes, are solved by
    conjugate gradients for all rows at once: ``P c`` is a look-up and ``P^T v`` a bucket sum, so
    one step costs a single product with H and the [clusters, clusters] systems are never formed.
    In exact arithmetic as many steps as a row has table entries suffice, which is the default; the
    objective falls with every step. An entry that no code uses keeps its value.

    Args:
        weight: float32 ``[rows, columns]``.
        codes: uint8 ``[rows, columns]``.
        tables: float32 ``[rows, groups, clusters]``, the starting point.
        hessian: float32 ``[columns, columns]``, positive definite.
        steps: of conjugate gradients at most.

    Returns:
        float32 ``[rows, groups, clusters]``; not sorted.
    """
    counts = _bucket_sums(torch.ones_like(weight), codes, tables.shape)
    # Jacobi preconditioner: about an entry's own curvature, the sum of diag H over its columns.
    own = _bucket_sums(hessian.diagonal().repeat(len(weight), 1), codes, tables.shape)
    scale = torch.where(counts > 0, 1.0 / own.clamp(min=1e-30), torch.zeros_like(counts))

    solution = tables.double()
    residual = _bucket_sums((weight - dequantize(codes, tables)) @ hessian, codes, tables.shape)
    direction = scale * residual
    strength = (residual * direction).sum(dim=(1, 2))
    target = strength * _RELATIVE_TOLERANCE
    for _ in range(tables.shape[1] * tables.shape[2] if steps is None else steps):
        active = strength > target
        if not bool(active.any()):
            break
        step = dequantize(codes, direction.float())
        curved = _bucket_sums(step @ hessian, codes, tables.shape)
        curvature = (direction * curved).sum(dim=(1, 2))
        alpha = torch.where(active & (curvature > 0), strength / curvature, 0.0)[:, None, None]
        solution = solution + alpha * direction
        residual = residual - alpha * curved
        preconditioned = scale * residual
        updated = (residual * preconditioned).sum(dim=(1, 2))
        beta = torch.where(active, updated / strength, 0.0)[:, None, None]
        direction = preconditioned + beta * direction
        strength = updated
    return solution.float()


def descend_codes(
    weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor, cycles: int
) -> Tensor:
    """Cyclic coordinate descent on the codes, the tables held fixed.

    With the other columns as they are, the best value for column j is
    ``w_hat_j - ((w_hat - w) H)_j / H_jj``; the nearest table entry is taken. The gradient is kept
    up to date inside a block of columns and applied to the rest once a block. Never increases
    :func:`output_error`.

    Args:
        weight: float32 ``[rows, columns]``.
        codes: uint8 ``[rows, columns]``.
        tables: float32 ``[rows, groups, clusters]``, ascending.
        hessian: float32 ``[columns, columns]``, positive diagonal.
        cycles: passes over all columns.

    Returns:
        uint8 ``[rows, columns]``, new codes.
    """
    columns = weight.shape[1]
    approximation = dequantize(codes, tables)
    gradient = (approximation - weight) @ hessian
    chosen_codes = codes.T.contiguous()
    lookup = TransposedTables(tables)
    group_width = columns // tables.shape[1]
    inverse_diagonal = (1.0 / hessian.diagonal()).tolist()
    for _ in range(cycles):
        for start in range(0, columns, BLOCK_COLUMNS):
            stop = min(start + BLOCK_COLUMNS, columns)
            current = approximation[:, start:stop].T.contiguous()
            slope = gradient[:, start:stop].T.contiguous()
            changes = torch.empty_like(current)
            local = hessian[start:stop, start:stop].contiguous()
            for i in range(stop - start):
                column = start + i
                wanted = torch.add(current[i], slope[i], alpha=-inverse_diagonal[column])
                code, chosen = lookup.nearest(wanted, column // group_width)
                chosen_codes[column] = code
                torch.sub(chosen, current[i], out=changes[i])
                slope.addr_(local[i], changes[i])
            approximation[:, start:stop] += changes.T
            gradient.addmm_(changes.T, hessian[start:stop])
    return chosen_codes.T.contiguous()


def sort_tables(codes: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Put every table in ascending order and rename the codes to match; the weight stays the same.

    Args:
        codes: uint8 ``[rows, columns]``.
        tables: float ``[rows, groups, clusters]``.

    Returns:
        The new codes and tables.
    """
    ordered, order = tables.sort(dim=2)
    renamed = order.argsort(dim=2).to(torch.uint8)
    rows, columns = codes.shape
    index = codes.view(rows, tables.shape[1], -1).long()
    return renamed.gather(2, index).view(rows, columns), ordered


def _bucket_sums(values: Tensor, codes: Tensor, shape: torch.Size) -> Tensor:
    """``P^T v``: per row, group and code the sum of the values with that code, float64."""
    rows, groups, _ = shape
    sums = torch.zeros(shape, dtype=torch.float64, device=values.device)
    # The index and the float64 values take 16 bytes a weight, so some rows at a time.
    chunk = max(1, _CHUNK_WEIGHTS // values.shape[1])
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        index = codes[part].reshape(-1, groups, values.shape[1] // groups).long()
        sums[part].scatter_add_(2, index, values[part].double().view(index.shape))
    return sums
