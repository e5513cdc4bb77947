"""Better tables for given codes and better codes for given tables, under the full Hessian.

The objective of a row is ``(w_hat - w) H (w_hat - w)^T``, the layer's output error on the
calibration tokens. Least squares for the tables and cyclic coordinate descent for the codes are the
two half-steps of LNQ (Kim et al., GuidedQuant, arXiv:2505.07004, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.compressor import native
from spallm_serve.compressor.rounding import TransposedTables, column_blocks
from spallm_serve.kernels.reference import dequantize

# Systems larger than this, from many groups, cost more to form than to iterate on.
_SOLVED_ENTRIES = 128
# Share added to the diagonal of a system: what float32 sums leave uncertain of it.
_RIDGE = 1e-6
# Enough for all of the gain at 4 bits; the start is near the optimum already.
_REFIT_STEPS = 4
_RELATIVE_TOLERANCE = 1e-12
_CHUNK_WEIGHTS = 1 << 18


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """``diag((W_hat - W) H (W_hat - W)^T)``: float32 ``[rows]``."""
    difference = approximation - weight
    return ((difference @ hessian) * difference).sum(dim=1)


def refit_tables(codes: Tensor, tables: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """Least-squares tables for given codes: minimise :func:`output_error` over the entries.

    The normal equations of a row are ``P^T H P step = -P^T gradient``, P the one-hot codes. An
    entry that no code uses keeps its value.

    Args:
        codes: uint8 ``[rows, columns]``.
        tables: float32 ``[rows, groups, clusters]``, the starting point.
        gradient: float32 ``[rows, columns]``, ``(W_hat - W) H`` for these tables and codes.
        hessian: float32 ``[columns, columns]``, positive definite.

    Returns:
        float32 ``[rows, groups, clusters]``; not sorted.
    """
    _, groups, clusters = tables.shape
    residual = -_bucket_sums(gradient, codes, tables.shape)
    if native.usable_for(codes) and groups * clusters <= _SOLVED_ENTRIES:
        return tables + native.solve_tables(codes, hessian, residual.float(), _RIDGE)
    return tables + _conjugate_gradients(codes, residual, hessian, _REFIT_STEPS).float()


def _conjugate_gradients(codes: Tensor, residual: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Solve the normal equations for all rows at once, on any device.

    ``P c`` is a look-up and ``P^T v`` a bucket sum, so one step costs a single product with H and
    the systems are never formed. In exact arithmetic as many steps as a row has table entries
    suffice; the objective falls with every step.

    Args:
        codes: uint8 ``[rows, columns]``.
        residual: float64 ``[rows, groups, clusters]``, the right-hand sides.
        hessian: float32 ``[columns, columns]``.
        steps: at most.

    Returns:
        float64 ``[rows, groups, clusters]``.
    """
    ones = hessian.new_ones(codes.shape)
    counts = _bucket_sums(ones, codes, residual.shape)
    # Jacobi preconditioner: about an entry's own curvature, the sum of diag H over its columns.
    own = _bucket_sums(ones * hessian.diagonal(), codes, residual.shape)
    scale = torch.where(counts > 0, 1.0 / own.clamp(min=1e-30), torch.zeros_like(counts))

    solution = torch.zeros_like(residual)
    direction = scale * residual
    strength = (residual * direction).sum(dim=(1, 2))
    target = strength * _RELATIVE_TOLERANCE
    for _ in range(steps):
        active = strength > target
        if not bool(active.any()):
            break
        step = dequantize(codes, direction.float())
        curved = _bucket_sums(step @ hessian, codes, residual.shape)
        curvature = (direction * curved).sum(dim=(1, 2))
        alpha = torch.where(active & (curvature > 0), strength / curvature, 0.0)[:, None, None]
        solution = solution + alpha * direction
        residual = residual - alpha * curved
        preconditioned = scale * residual
        updated = (residual * preconditioned).sum(dim=(1, 2))
        beta = torch.where(active, updated / strength, 0.0)[:, None, None]
        direction = preconditioned + beta * direction
        strength = updated
    return solution


def descend_codes(
    codes: Tensor,
    tables: Tensor,
    approximation: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    cycles: int,
) -> None:
    """Cyclic coordinate descent on the codes, the tables held fixed.

    With the other columns as they are, the best value for column j is
    ``w_hat_j - ((w_hat - w) H)_j / H_jj``; the nearest table entry is taken. The gradient is kept
    up to date inside a block of columns and applied to the rest once a block. Never increases
    :func:`output_error`.

    Args:
        codes: uint8 ``[rows, columns]``; rewritten.
        tables: float32 ``[rows, groups, clusters]``, ascending.
        approximation: float32 ``[rows, columns]``, what the codes and tables stand for; kept so.
        gradient: float32 ``[rows, columns]``, ``(W_hat - W) H``; kept so.
        hessian: float32 ``[columns, columns]``, positive diagonal.
        cycles: passes over all columns.
    """
    columns = codes.shape[1]
    descend = native.descend_columns if native.usable_for(codes) else _descend_columns
    group_of = torch.arange(columns, device=codes.device) // (columns // tables.shape[1])
    tables = tables.contiguous()
    for _ in range(cycles):
        for block in column_blocks(columns):
            changes = descend(approximation, gradient, tables, group_of, hessian, codes, block)
            gradient.addmm_(changes, hessian[block])


def _descend_columns(
    approximation: Tensor,
    gradient: Tensor,
    tables: Tensor,
    group_of: Tensor,
    hessian: Tensor,
    codes: Tensor,
    columns: slice,
) -> Tensor:
    """One block, on any device; see :func:`spallm_serve.compressor.native.descend_columns`."""
    current = approximation[:, columns].T.contiguous()
    slope = gradient[:, columns].T.contiguous()
    changes = torch.empty_like(current)
    local = hessian[columns, columns].contiguous()
    inverse_diagonal = (1.0 / local.diagonal()).tolist()
    lookup = TransposedTables(tables)
    for i, group in enumerate(group_of[columns].tolist()):
        wanted = torch.add(current[i], slope[i], alpha=-inverse_diagonal[i])
        code, chosen = lookup.nearest(wanted, group)
        codes[:, columns.start + i] = code
        torch.sub(chosen, current[i], out=changes[i])
        slope.addr_(local[i], changes[i])
    approximation[:, columns] += changes.T
    return changes.T


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
