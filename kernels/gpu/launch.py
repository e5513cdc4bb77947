"""Launch the Triton programs on tensors: which program, grids, block shapes.

Block shapes are fixed, found by timing on an H100: the same call gives the same bits in every
process, and nothing is tuned while a server waits. The first call of a kind compiles and loads its
program, so one has to come before a CUDA graph is captured. Tables are taken to be finite: an
infinite entry that no code of a row names may still make that slot's own outputs NaN, but never
another slot's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from spallm_serve.kernels.gpu import gradients, products
from spallm_serve.kernels.gpu.layout import units_of

# So many tokens of one slot are worth a dense copy of the weight and the BLAS, as many rows at a
# time as keep a GPU busy.
BLAS_TOKENS = 64
DENSE_ROWS = 4096
# Of the weight's gradient, in float32; what the second-level cache holds is not written and read.
GRADIENT_WEIGHTS = 1 << 23
_BLOCK_ROWS = 64
# So many tokens, each with its own slot, are multiplied one by one, and so many of one slot.
EACH_TOKENS = {2: 6, 3: 12, 4: 14}
_EACH_OF_ONE_SLOT = 3
# A unit of tokens with more slots than that is multiplied by buckets.
UNIT = 64
BLOCK_SLOTS = {2: 1, 3: 2, 4: 3}
# The tensor cores take tokens by sixteens at the least.
_LEAST_TOKENS = 16
# More would not fit beside four sums in registers.
_BUCKET_TOKENS = 32
# Programs that keep a large GPU busy: work is cut into parts until there are as many.
PROGRAMS = 264
_MOST_PARTS = 16
# float32 sums of all parts that are in memory at a time.
MOST_SUMS = 1 << 26

_Shape = dict[str, int]  # ROWS, EIGHTS, and Triton's num_warps and num_stages

SHAPES: dict[str, _Shape] = {
    "each": {"ROWS": 4, "EIGHTS": 128, "num_warps": 1, "num_stages": 2},
    "few tokens": {"ROWS": 16, "EIGHTS": 16, "num_warps": 2, "num_stages": 3},
    "many tokens": {"ROWS": 128, "EIGHTS": 4, "num_warps": 4, "num_stages": 3},
    "buckets": {"ROWS": 64, "EIGHTS": 4, "num_warps": 4, "num_stages": 3},
    "added parts": {"ROWS": 512, "num_warps": 4},
    "dequantize": {"ROWS": 2, "EIGHTS": 128, "num_warps": 2, "num_stages": 2},
    "table gradient": {"ROWS": 1, "EIGHTS": 64, "num_warps": 4, "num_stages": 2},
}


def multiply(
    x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``[tokens, out]`` in the dtype of ``x``; arguments are checked.

    Raises:
        ValueError: more tokens than 32-bit offsets reach.
    """
    tokens = x.shape[0]
    layer = _Layer(x, codes, tables, x.shape[1])
    y = x.new_empty(tokens, layer.rows)
    if tokens == 0:
        return y
    if tokens <= (_EACH_OF_ONE_SLOT if slots is None else EACH_TOKENS[layer.bits]):
        _launch(
            products.multiply_each,
            SHAPES["each"],
            (tokens * _row_blocks(layer.rows, "each"),),
            (x, codes, layer.tables, bias, y, slots, tokens, *layer.sizes, layer.n_slots),
            layer.constants | {"HAS_SLOTS": slots is not None, "HAS_BIAS": bias is not None},
        )
    elif slots is None and tokens >= BLAS_TOKENS:
        _multiply_dense(y, x, layer, bias)
    else:
        _multiply_in_parts(y, x, layer, slots, bias)
    return y


def _multiply_in_parts(
    y: Tensor, x: Tensor, layer: _Layer, slots: Tensor | None, bias: Tensor | None
) -> None:
    """By blocks, by buckets, or, where only the device knows how many slots a unit has, by both, of
    which one does each unit. So many tokens at a time that their parts are not too large."""
    step = max(1, MOST_SUMS // (_MOST_PARTS * layer.rows * UNIT)) * UNIT
    for first in range(0, x.shape[0], step):
        few = slice(first, first + step)
        _multiply_few(y[few], x[few], layer, None if slots is None else slots[few], bias)


def _multiply_few(
    y: Tensor, x: Tensor, layer: _Layer, slots: Tensor | None, bias: Tensor | None
) -> None:
    tokens = x.shape[0]
    by_blocks = slots is None or tokens > UNIT
    block = UNIT if slots is not None else _block_of(tokens)
    shape = SHAPES["few tokens" if block < UNIT else "many tokens"]
    few = _Parts.of(layer, shape, tokens, block, sets_of_codes=1)
    bucket_block = min(_BUCKET_TOKENS, _block_of(tokens))
    many = _Parts.of(layer, SHAPES["buckets"], tokens, bucket_block, 1 << (layer.bits - 2))
    most_slots = BLOCK_SLOTS[layer.bits] if by_blocks else 0
    count = max(few.count if by_blocks else 0, many.count if slots is not None else 0)
    found = x.new_empty(count, tokens, layer.rows, dtype=torch.float32)
    arguments = (x, layer.codes, layer.tables, found, slots, tokens, *layer.sizes, layer.n_slots)
    if by_blocks:
        _launch(
            products.multiply_blocks,
            shape,
            few.grid,
            (*arguments, few.eights, most_slots),
            layer.constants | {"HAS_SLOTS": slots is not None, "TOKENS": block},
        )
    if slots is not None:
        _launch(
            products.multiply_by_buckets,
            SHAPES["buckets"],
            many.grid,
            (*arguments, many.eights, most_slots),
            layer.constants | {"UNIT": UNIT, "TOKENS": bucket_block},
        )
    _launch(
        products.add_parts,
        SHAPES["added parts"],
        (tokens, _row_blocks(layer.rows, "added parts")),
        (found, bias, y, slots, tokens, layer.rows, few.count, many.count, most_slots),
        {"HAS_SLOTS": slots is not None, "HAS_BIAS": bias is not None, "UNIT": UNIT},
    )


def input_gradient(
    dy: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, columns: int
) -> Tensor:
    """``dy W``: ``[tokens, columns]`` in the dtype of ``dy``; one slot after another."""
    layer = _Layer(dy, codes, tables, columns)
    if slots is None:
        return _multiply_transposed(dy, layer, slot=0)
    dx = dy.new_full((dy.shape[0], columns), torch.nan)
    for slot in range(layer.n_slots):
        mine = (slots == slot)[:, None]
        dx = torch.where(mine, _multiply_transposed(dy, layer, slot), dx)
    return dx


def table_gradient(
    dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None
) -> Tensor:
    """float32 in the shape of ``tables``; tokens whose slot has no tables count nowhere.

    The BLAS makes a part of ``dy^T x`` at a time, which is summed by code, so that the gradient of
    a large weight is never whole.
    """
    layer = _Layer(x, codes, tables, x.shape[1])
    found = torch.zeros(tables.shape, dtype=torch.float32, device=x.device)
    for slot in range(1 if slots is None else layer.n_slots):
        mine, given = dy, x
        if slots is not None:
            # Both: a zero times what another token has may not be zero.
            mine, given = (torch.where((slots == slot)[:, None], each, 0) for each in (dy, x))
        for rows in layer.parts(max(1, GRADIENT_WEIGHTS // x.shape[1])):
            _launch(
                gradients.sum_by_code,
                SHAPES["table gradient"],
                (_row_blocks(rows.stop - rows.start, "table gradient"), layer.groups),
                (_product(mine[:, rows].T, given), codes, found[slot], rows.start, *layer.sizes),
                layer.constants,
            )
    return found


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In float32, whatever autocast says."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype != torch.float32:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()


class _Layer:
    """The operands' sizes that all programs take, and the layer's dense weight in parts."""

    def __init__(self, x: Tensor, codes: Tensor, tables: Tensor, columns: int) -> None:
        self.rows, self.groups, entries = tables.shape[1:]
        tokens = x.shape[0]
        if tokens * max(self.rows, columns) >= 1 << 31:
            raise ValueError(
                f"x: expected fewer than {(1 << 31) // max(self.rows, columns)} tokens for "
                f"{self.rows} rows and {columns} columns (offsets are of 32 bits), got {tokens}; "
                "multiply them in parts"
            )
        # Entries are read two at a time.
        self.tables = tables.clone() if tables.data_ptr() % 4 else tables
        self.codes, self.dtype = codes, x.dtype
        self.n_slots = tables.shape[0]
        self.bits = entries.bit_length() - 1
        self.units = units_of(columns, self.groups)
        self.sizes = (self.rows, columns, self.groups, self.units, codes.shape[1] // 4)
        ptx = x.dtype != torch.float32 and os.environ.get("TRITON_INTERPRET") != "1"
        self.constants: dict[str, Any] = {"BITS": self.bits, "PTX": ptx}

    def parts(self, rows: int) -> Iterator[slice]:
        """About so many rows at a time, a whole number of blocks of every program."""
        step = max(1, rows // _BLOCK_ROWS) * _BLOCK_ROWS
        for first in range(0, self.rows, step):
            yield slice(first, min(first + step, self.rows))

    def dense_parts(self, slot: int) -> Iterator[tuple[slice, Tensor]]:
        """A slot's weight in the dtype of ``x``, so many rows at a time; each part is valid until
        the next is made."""
        space: Tensor | None = None
        for rows in self.parts(DENSE_ROWS):
            count = rows.stop - rows.start
            if space is None:
                space = self.codes.new_empty(count, self.sizes[1], dtype=self.dtype)
            _launch(
                products.dequantize,
                SHAPES["dequantize"],
                (_row_blocks(count, "dequantize"), self.groups),
                (self.codes, self.tables[slot], space, rows.start, *self.sizes),
                self.constants,
            )
            yield rows, space[:count]


def _multiply_dense(y: Tensor, x: Tensor, layer: _Layer, bias: Tensor | None) -> None:
    for rows, weight in layer.dense_parts(slot=0):
        torch.mm(x, weight.T, out=y[:, rows])
    if bias is not None:
        y += bias


def _multiply_transposed(dy: Tensor, layer: _Layer, slot: int) -> Tensor:
    if layer.rows <= DENSE_ROWS:
        ((rows, weight),) = layer.dense_parts(slot)
        return dy @ weight
    dx = dy.new_zeros(dy.shape[0], layer.sizes[1], dtype=torch.float32)
    for rows, weight in layer.dense_parts(slot):
        dx += _product(dy[:, rows], weight)
    return dx.to(dy.dtype)


@dataclass(frozen=True)
class _Parts:
    """How a product is cut.

    Attributes:
        grid: blocks of tokens, blocks of rows, parts.
        eights: of each group's columns in a part.
        count: parts.
    """

    grid: tuple[int, int, int]
    eights: int
    count: int

    @classmethod
    def of(
        cls, layer: _Layer, shape: _Shape, tokens: int, block: int, sets_of_codes: int
    ) -> _Parts:
        """Cut the columns until a GPU is busy; there are as many parts for each set of codes."""
        blocks = triton.cdiv(tokens, block), triton.cdiv(layer.rows, shape["ROWS"])
        programs = blocks[0] * blocks[1] * sets_of_codes
        tile, eights = shape["EIGHTS"], 4 * layer.units
        most = min(triton.cdiv(eights, tile), _MOST_PARTS // sets_of_codes)
        wanted = min(most, triton.cdiv(PROGRAMS, programs))
        part = triton.cdiv(triton.cdiv(eights, wanted), tile) * tile
        count = triton.cdiv(eights, part) * sets_of_codes
        return cls((*blocks, count), part, count)


def _row_blocks(rows: int, kind: str) -> int:
    return -(-rows // SHAPES[kind]["ROWS"])


def _block_of(tokens: int) -> int:
    return min(UNIT, max(_LEAST_TOKENS, triton.next_power_of_2(tokens)))


def _launch(
    program: Any,
    shape: _Shape,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(arguments[0]):
        program[grid](*arguments, **constants, **shape)
