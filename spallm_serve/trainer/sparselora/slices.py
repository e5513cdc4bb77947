"""Rows and columns of a frozen linear layer's weight, dense or looked up in a sketch.

A sketch keeps its codes in its kernel's layout, from which no rows can be had. Beside it therefore
stand the bit-planes of the layers whose slices are taken, or, for columns, the bit-planes of the
transposed codes: bits / 8 bytes per weight. Nothing is decoded but what was chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeGuard

import torch
from torch import Tensor, nn

from spallm_serve.kernels.packing import pack_codes, unpack_codes
from spallm_serve.kernels.reference import dequantize
from spallm_serve.layers import SketchedLinear


class Slices(nn.Module, ABC):
    """Gives slices of a weight ``[out, in]``, along its rows or its columns."""

    @abstractmethod
    def forward(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``[len(index), in]``, or columns as rows: ``[len(index), out]``."""


def is_sliceable(module: object) -> TypeGuard[nn.Linear | SketchedLinear]:
    """Whether slices of a module's weight can be taken (not of one quantized by others)."""
    if isinstance(module, nn.Linear):
        return module.weight.is_floating_point() and module.weight.dim() == 2
    return isinstance(module, SketchedLinear)


def rows_of(linear: nn.Linear | SketchedLinear) -> Slices:
    """Rows of a layer's weight."""
    return _SketchedRows(linear) if isinstance(linear, SketchedLinear) else _DenseRows(linear)


def columns_of(linear: nn.Linear | SketchedLinear) -> Slices:
    """Columns of a layer's weight; a dense one had better :func:`store_by_columns` first."""
    if isinstance(linear, SketchedLinear):
        return _SketchedColumns(linear)
    return _DenseColumns(linear)


def store_by_columns(linear: nn.Linear) -> None:
    """Lay a frozen weight's columns out contiguously, in place of its rows.

    The weight keeps its shape and values and is a transposed view of its memory; products with it
    take as long as before.
    """
    linear.weight.data = linear.weight.data.T.contiguous().T


def store_by_rows(linear: nn.Linear) -> None:
    """Undo :func:`store_by_columns`."""
    linear.weight.data = linear.weight.data.contiguous()


def values_of(linear: nn.Linear | SketchedLinear) -> Tensor:
    """The floating point numbers a layer holds: a dense weight, or a sketch's tables."""
    values = linear.tables if isinstance(linear, SketchedLinear) else linear.weight
    return values.detach()


def bit_planes(linear: SketchedLinear) -> Tensor:
    """The codes of a layer as uint8 bit-planes ``[bits, out, ceil(in / 8)]``."""
    planes: Tensor = linear.state_dict()["codes"]
    return planes


class _DenseRows(Slices):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple, so that it does not become a submodule here too

    def forward(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._linear[0].weight.detach().index_select(0, index).to(dtype)


class _DenseColumns(Slices):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = (linear,)

    def forward(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._linear[0].weight.detach().T.index_select(0, index).to(dtype)


class _SketchedRows(Slices):
    planes: Tensor

    def __init__(self, linear: SketchedLinear) -> None:
        super().__init__()
        self._linear = (linear,)
        self.register_buffer("planes", bit_planes(linear), persistent=False)

    def forward(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        (linear,) = self._linear
        codes = unpack_codes(self.planes.index_select(1, index), linear.in_features)
        return dequantize(codes, linear.tables.index_select(0, index).to(dtype))


class _SketchedColumns(Slices):
    planes: Tensor

    def __init__(self, linear: SketchedLinear) -> None:
        super().__init__()
        self._linear = (linear,)
        planes = bit_planes(linear)
        codes = unpack_codes(planes, linear.in_features)
        transposed = pack_codes(codes.T.contiguous(), planes.shape[0])
        self.register_buffer("planes", transposed, persistent=False)

    def forward(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        (linear,) = self._linear
        codes = unpack_codes(self.planes.index_select(1, index), linear.out_features)
        _, groups, entries = linear.tables.shape
        # [group and code, row of the weight]
        values = linear.tables.permute(1, 2, 0).flatten(0, 1).to(dtype)
        group = index // (linear.in_features // groups)
        return values.gather(0, group[:, None] * entries + codes)
