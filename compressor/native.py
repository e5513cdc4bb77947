"""The compressor's inner loops in C++, on the CPU; everything has a form in plain torch as well.

Tensors must be contiguous and of the types named; nothing is checked here, callers are our own.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spallm_serve.kernels.native import NativeLibraryError, load_native

_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
# tables, groups, clusters, group of each column; codes, rows, columns; start, width
_BLOCK = (_P, _I64, _I32, _P, _P, _I64, _I64, _I64, _I64)
_FUNCTIONS = {
    # values, weights, rows, columns, clusters; trial iterations, iterations, density points; tables
    "spallm_lloyd": (None, (_P, _P, _I64, _I64, _I32, _I32, _I32, _I64, _P)),
    # factor, work; errors
    "spallm_round_columns": (None, (*_BLOCK, _P, _P, _P)),
    # hessian, approximation, gradient; changes
    "spallm_descend_columns": (None, (*_BLOCK, _P, _P, _P, _P)),
    # codes, rows, columns, groups, clusters, hessian, residual, ridge; step
    "spallm_solve_tables": (None, (_P, _I64, _I64, _I64, _I32, _P, _P, _F32, _P)),
    "spallm_multiplies_bfloat16": (_I32, ()),
    # a, b, tokens, columns; sum
    "spallm_add_products": (None, (_P, _P, _I64, _I64, _P)),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where they were not built."""
    try:
        return load_native(Path(__file__).parent, _FUNCTIONS)
    except NativeLibraryError:
        return None


def usable_for(tensor: Tensor) -> bool:
    """Whether the compiled loops can work on this tensor's device."""
    return tensor.device.type == "cpu" and library() is not None


def multiplies(activations: Tensor) -> bool:
    """Whether :func:`add_products` works on these activations here."""
    native = library() if activations.device.type == "cpu" else None
    return (
        native is not None
        and activations.dtype == torch.bfloat16
        and bool(native.spallm_multiplies_bfloat16())
    )


def _loaded() -> ctypes.CDLL:
    native = library()
    assert native is not None
    return native


def lloyd(
    values: Tensor,
    weights: Tensor,
    clusters: int,
    trial_iterations: int,
    iterations: int,
    density_points: int,
) -> Tensor:
    """:func:`spallm_serve.compressor.lloyd.lloyd_tables`, in the same steps."""
    rows, columns = values.shape
    tables = torch.empty(rows, clusters)
    _loaded().spallm_lloyd(
        values.data_ptr(), weights.data_ptr(), rows, columns, clusters,
        trial_iterations, iterations, density_points, tables.data_ptr(),
    )  # fmt: skip
    return tables


def round_columns(
    work: Tensor,
    tables: Tensor,
    group_of: Tensor,
    factor: Tensor,
    codes: Tensor,
    columns: slice,
) -> Tensor:
    """Round one block of columns of ``work``; fills their ``codes``.

    Returns:
        float32 ``[rows, width]``, the errors over ``U_ii``.
    """
    errors = torch.empty(work.shape[0], columns.stop - columns.start)
    _loaded().spallm_round_columns(
        *_block(tables, group_of, codes, columns),
        factor.data_ptr(), work.data_ptr(), errors.data_ptr(),
    )  # fmt: skip
    return errors


def descend_columns(
    approximation: Tensor,
    gradient: Tensor,
    tables: Tensor,
    group_of: Tensor,
    hessian: Tensor,
    codes: Tensor,
    columns: slice,
) -> Tensor:
    """Descend on one block of columns; rewrites their ``codes`` and ``approximation``.

    Returns:
        float32 ``[rows, width]``, what the approximation changed by.
    """
    changes = torch.empty(gradient.shape[0], columns.stop - columns.start)
    _loaded().spallm_descend_columns(
        *_block(tables, group_of, codes, columns),
        hessian.data_ptr(), approximation.data_ptr(), gradient.data_ptr(), changes.data_ptr(),
    )  # fmt: skip
    return changes


def solve_tables(codes: Tensor, hessian: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """Solve ``(P^T H P) step = residual`` row by row, P the one-hot codes.

    Args:
        codes: uint8 ``[rows, columns]``.
        hessian: float32 ``[columns, columns]``.
        residual: float32 ``[rows, groups, clusters]``.
        ridge: share by which the diagonal is raised.

    Returns:
        float32 ``[rows, groups, clusters]``; zeros for rows without a positive definite system.
    """
    rows, groups, clusters = residual.shape
    step = torch.empty_like(residual)
    _loaded().spallm_solve_tables(
        codes.data_ptr(), rows, codes.shape[1], groups, clusters,
        hessian.data_ptr(), residual.data_ptr(), ridge, step.data_ptr(),
    )  # fmt: skip
    return step


def add_products(a: Tensor, b: Tensor, total: Tensor) -> None:
    """``total += a^T b`` in float32; only at and above the diagonal where ``a is b``.

    Args:
        a, b: bfloat16 ``[tokens, columns]``, contiguous.
        total: float32 ``[columns, columns]``.
    """
    tokens, columns = a.shape
    _loaded().spallm_add_products(a.data_ptr(), b.data_ptr(), tokens, columns, total.data_ptr())


def _block(
    tables: Tensor, group_of: Tensor, codes: Tensor, columns: slice
) -> tuple[int, int, int, int, int, int, int, int, int]:
    _, groups, clusters = tables.shape
    width = columns.stop - columns.start
    return (
        tables.data_ptr(), groups, clusters, group_of.data_ptr(),
        codes.data_ptr(), *codes.shape, columns.start, width,
    )  # fmt: skip
