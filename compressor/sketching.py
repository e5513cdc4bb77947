"""One weight matrix to codes and tables, under the Hessian of its inputs; on plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spallm_serve.checkpoint import LayerFormat
from spallm_serve.compressor.hessian import DampedFactor, damped_factor
from spallm_serve.compressor.lloyd import lloyd_tables
from spallm_serve.compressor.refit import (
    descend_codes,
    output_error,
    refit_tables,
    sort_tables,
)
from spallm_serve.compressor.rounding import round_with_feedback
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.kernels.reference import dequantize

# Temporaries take up to 60 bytes a weight; rows are independent, so they go in chunks.
_CHUNK_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class Curvature:
    """What compressing needs to know of a linear's inputs; linears with one input share it.

    Attributes:
        hessian: float32 ``[in, in]``, positive diagonal.
        order: int64 ``[in]``, rounding order: columns by falling diag H.
        factor: of the damped Hessian in that order; its ``upper`` is None if every Cholesky failed.
    """

    hessian: Tensor
    order: Tensor
    factor: DampedFactor


def curvature(hessian: Tensor, damping: float) -> Curvature:
    """Order and factor a Hessian whose dead columns are settled."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return Curvature(hessian, order, damped_factor(hessian, order, damping))


def column_weights(factor: Tensor, exponent: float) -> Tensor:
    """How much each column's rounding error matters to Lloyd: ``s_j = U_jj ** -exponent``.

    ``U_jj**2`` is the conditional variance of column j given those already rounded; exponent 2 is
    what the loss of error-feedback rounding itself weighs a column by (it sums ``e**2 / U_jj**2``).

    Args:
        factor: float32 ``[columns, columns]``, U in rounding order.
        exponent: p; 0 weighs all columns alike.

    Returns:
        float32 ``[columns]`` with mean 1, in rounding order.
    """
    weights = factor.diagonal().double().pow(-exponent)
    return (weights / weights.mean()).float()


def sketch_weight(
    weight: Tensor,
    inputs: Curvature,
    bits: int,
    groups_per_row: int,
    *,
    weight_exponent: float,
    refit: bool,
    descent_cycles: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compress a weight: Lloyd tables, rounding with error feedback, then refit.

    Groups are contiguous in the original column order while rounding walks the columns by falling
    diag H, so errors cross group borders as they should. Where the Hessian could not be factored,
    the weight is rounded to unweighted tables without feedback.

    Args:
        weight: float32 ``[out, in]``.
        inputs: the curvature of its inputs.
        bits: 2, 3 or 4.
        groups_per_row: divides ``in``.
        weight_exponent: see :func:`column_weights`.
        refit: improve tables and codes under the full Hessian after rounding.
        descent_cycles: passes of coordinate descent over the codes during the refit.

    Returns:
        codes uint8 ``[out, in]``; tables float32 ``[out, groups, 2**bits]``, ascending, every value
        representable in float16; their :func:`output_error`, float32 ``[out]``.
    """
    columns = weight.shape[1]
    order, factor = inputs.order, inputs.factor.upper
    group_of = order // (columns // groups_per_row)
    ordered = weight[:, order]
    if factor is None:
        weights = torch.ones(columns, device=weight.device)
        factor = torch.eye(columns, device=weight.device)
        refit = False
    else:
        weights = column_weights(factor, weight_exponent)
    tables = torch.stack(
        [
            lloyd_tables(ordered[:, group_of == group], weights[group_of == group], 1 << bits)
            for group in range(groups_per_row)
        ],
        dim=1,
    )
    tables = as_stored(tables)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    codes[:, order] = round_with_feedback(ordered, tables, group_of, factor)
    if refit:
        return refine_sketch(weight, codes, tables, inputs.hessian, descent_cycles)
    return codes, tables, output_error(weight, dequantize(codes, tables), inputs.hessian)


def as_stored(tables: Tensor) -> Tensor:
    """The float32 values that tables have once they were on disk, in float16."""
    return tables.half().float()


@dataclass(frozen=True)
class SketchedRows:
    """A compressed matrix and what it cost.

    Attributes:
        codes: uint8 ``[rows, in]``, on the CPU.
        tables: float32 ``[rows, groups, 2**bits]``, on the CPU.
        error: float64 ``[rows]``, ``diag(D H D^T)`` with D what the sketch misses the weight by.
        energy: float64 ``[rows]``, ``diag(W H W^T)``.
    """

    codes: Tensor
    tables: Tensor
    error: Tensor
    energy: Tensor

    def relative_error(self, rows: slice = slice(None)) -> float:
        """The output error of some rows as a share of their output."""
        energy = float(self.energy[rows].sum())
        return float(self.error[rows].sum()) / energy if energy > 0 else 0.0


def sketch_rows(
    weight: Tensor, inputs: Curvature, chosen: LayerFormat, settings: CompressSettings
) -> SketchedRows:
    """:func:`sketch_weight` on a matrix of any height, a chunk of rows at a time.

    Args:
        weight: floating point ``[rows, in]``; converted to float32 by the chunk.
        inputs: the curvature of its inputs.
        chosen: bits and groups per row.
        settings: of the run.
    """
    chunk = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    parts = []
    for start in range(0, weight.shape[0], chunk):
        part = weight[start : start + chunk].to(inputs.hessian.device, torch.float32)
        codes, tables, error = sketch_weight(
            part,
            inputs,
            chosen.bits,
            chosen.groups_per_row,
            weight_exponent=settings.weight_exponent,
            refit=settings.refit,
            descent_cycles=settings.descent_cycles,
        )
        energy = output_error(part, torch.zeros_like(part), inputs.hessian)
        parts.append((codes.cpu(), tables.cpu(), error.double().cpu(), energy.double().cpu()))
    return SketchedRows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def refine_sketch(
    weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor, descent_cycles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Refit the tables, descend on the codes, refit again; a row that did not gain stays as it was.

    Args and returns are as in :func:`sketch_weight`.
    """
    start_codes, start_tables = codes, tables
    approximation = dequantize(codes, tables)
    gradient = (approximation - weight) @ hessian
    before = (gradient * (approximation - weight)).sum(dim=1)
    codes, tables = _refitted(codes, tables, gradient, hessian)
    if descent_cycles:
        approximation = dequantize(codes, tables)
        torch.matmul(approximation - weight, hessian, out=gradient)
        descend_codes(codes, tables, approximation, gradient, hessian, descent_cycles)
        codes, tables = _refitted(codes, tables, gradient, hessian)
    del gradient, approximation
    tables = as_stored(tables)
    after = output_error(weight, dequantize(codes, tables), hessian)
    better = after < before
    codes = torch.where(better[:, None], codes, start_codes)
    tables = torch.where(better[:, None, None], tables, start_tables)
    return codes, tables, torch.where(better, after, before)


def _refitted(
    codes: Tensor, tables: Tensor, gradient: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    return sort_tables(codes, refit_tables(codes, tables, gradient, hessian))
