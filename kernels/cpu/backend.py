"""The native CPU backend: few tokens multiply straight from the codes, many go to the BLAS.

A run of many tokens of one slot is limited by arithmetic, where nothing beats the BLAS, unless it
is products of integers beside float32: the weight is decoded tile by tile, each tile multiplied
while it is in the cache. Everything else reads the codes once for all tokens, whatever their slots.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from spallm_serve.kernels.arguments import (
    check_code_rows,
    check_slots_in_range,
    check_types,
    slot_error,
)
from spallm_serve.kernels.backend import Request
from spallm_serve.kernels.cpu.integers import INTEGER_TYPES, from_integers
from spallm_serve.kernels.cpu.layout import (
    from_cpu_layout,
    read_header,
    row_bytes,
    to_cpu_layout,
)
from spallm_serve.kernels.cpu.library import LEVELS, best_level, library
from spallm_serve.kernels.native import NativeLibraryError
from spallm_serve.kernels.reference import slot_runs

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What the kernels answer where the header says something else, or there are no such instructions.
_OTHER_CODES, _NO_INTEGERS = -2, -3
# Tokens of one slot from which decoding for the BLAS pays.
BLAS_TOKENS = 80
# Set to 1, the BLAS, whose sums depend on how many tokens there are, is left out of the product.
INVARIANT_VARIABLE = "SPALLM_BATCH_INVARIANT"
# Of a product of integers at a time: their activations stay in the second cache.
_INTEGER_TOKENS = 128
# Weights decoded at a time; smaller tiles are slower to multiply by.
TILE_WEIGHTS = 4 << 20
# The BLAS is slow at odd heights.
_EVEN_ROWS = 64
# Weights of whose gradient a tile is made at a time: a sixteenth of a layer's, within these limits.
GRADIENT_TILE_WEIGHTS = (1 << 18, 1 << 20)
_GRADIENT_TILES = 16


class CpuBackend:
    """C++ kernels at one level of instructions.

    Args:
        level: one of :data:`LEVELS`; None for the best that the processor has.
    """

    def __init__(self, level: str | None = None) -> None:
        self.name = "cpu" if level is None else f"cpu-{level}"
        self._forced = None if level is None else LEVELS.index(level)

    @property
    def level(self) -> int:
        """Position of the instructions used in :data:`LEVELS`."""
        return best_level() if self._forced is None else self._forced

    def why_not(self, request: Request) -> str | None:
        """CPU tensors of the usual types, where the library is there."""
        if request.device != "cpu":
            return f"the tensors are on {request.device}"
        if request.dtype not in _TYPES:
            return f"no kernel for {request.dtype}"
        try:
            best = best_level()
        except NativeLibraryError as error:
            return str(error)
        if self._forced is not None and self._forced > best:
            return f"this processor has no {LEVELS[self._forced]}"
        return None

    def rounds_tables(self, dtype: torch.dtype) -> bool:
        """For bfloat16, where there are instructions that multiply it."""
        return dtype == torch.bfloat16 and self.level == LEVELS.index("avx512bf16")

    def prepare(self, planes: Tensor, columns: int, groups: int) -> Tensor:
        """See :func:`to_cpu_layout`."""
        return to_cpu_layout(planes, columns, groups)

    def planes(self, codes: Tensor) -> Tensor:
        """See :func:`from_cpu_layout`."""
        return from_cpu_layout(codes)

    def owns(self, codes: Tensor) -> bool:
        """Bytes in rows."""
        return codes.dim() == 2 and codes.dtype == torch.uint8

    def rows(self, codes: Tensor) -> int:
        """The first dimension, less the header."""
        return codes.shape[0] - 1

    def check(self, codes: Tensor, columns: int, groups: int, bits: int) -> None:
        """Refuse codes of another width, or where the kernels could not read them.

        Raises:
            ValueError: what was expected and what came.
        """
        if codes.device.type != "cpu":
            raise ValueError(
                f"codes: are laid out for the CPU, got on {codes.device}; prepare_codes makes "
                "those for a device from bit-planes that lie there"
            )
        check_code_rows(codes, row_bytes(columns, groups, bits), columns, groups, bits)
        # What is in the rows is looked at by the kernels themselves: here it would take as long as
        # a small layer's product.

    def lut_linear(
        self, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """``[tokens, out]`` in the dtype of ``x``.

        Of fewer than :data:`BLAS_TOKENS` tokens of a slot, or with :data:`INVARIANT_VARIABLE` at 1,
        each has the same output to the bit whatever other tokens there are.

        Raises:
            ValueError: a slot without tables; an unsupported dtype.
        """
        check_types(x, tables, bias, _TYPES)
        return self._linear(x, codes, tables, None, slots, bias, blas=True)

    def integer_linear(
        self, x: Tensor, codes: Tensor, values: Tensor, scales: Tensor, slots: Tensor | None
    ) -> Tensor:
        """As :meth:`lut_linear` with tables as integers, and without a bias.

        The BLAS has a part in it only where it multiplies the dtype of ``x`` by instructions of its
        own: bfloat16.

        Args:
            x, codes, slots: as there.
            values, scales: of :func:`~spallm_serve.kernels.cpu.integers.to_integers`, int8 or
                int16 ``[n_slots, out, groups, 2**bits]`` and float32 ``[n_slots, out]``.

        Raises:
            ValueError: a slot without tables; an unsupported dtype; no instructions for it.
        """
        check_types(x, scales, None, _TYPES)
        if values.dtype not in INTEGER_TYPES or scales.dtype != torch.float32:
            raise ValueError(
                f"tables: expected int8 or int16 and scales of float32, got {values.dtype} and "
                f"{scales.dtype}"
            )
        blas = self.rounds_tables(x.dtype)
        return self._linear(x, codes, values, scales, slots, None, blas=blas)

    def input_gradient(
        self, dy: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, columns: int
    ) -> Tensor:
        """``[tokens, columns]`` in the dtype of ``dy``; tiles of the weight are decoded in turn."""
        dx = dy.new_zeros(dy.shape[0], columns)
        dtype = self._blas_dtype(dy.dtype)
        for slot, tokens in slot_runs(slots, dy.shape[0]):
            theirs = dy[tokens].to(dtype)
            gathered = torch.zeros(theirs.shape[0], columns)
            for rows, weight in self._tiles(codes, tables[slot], columns, dtype):
                gathered += theirs[:, rows] @ weight
            dx[tokens] = gathered.to(dy.dtype)
        return dx

    def table_gradient(
        self, dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None
    ) -> Tensor:
        """float32 in the shape of ``tables``; of a weight's gradient only a tile is ever made."""
        columns = x.shape[1]
        dtables = torch.zeros(tables.shape, dtype=torch.float32)
        self._refuse_other_codes(codes, tables[0], columns)
        least, most = GRADIENT_TILE_WEIGHTS
        size = min(most, max(least, self.rows(codes) * columns // _GRADIENT_TILES))
        tiles = self._tile_rows(codes, columns, size)
        dtype = self._blas_dtype(x.dtype)
        dy, x = dy.to(dtype), x.to(dtype)
        tile = x.new_empty(tiles[0].stop if tiles else 0, columns)
        for slot, tokens in slot_runs(slots, x.shape[0]):
            theirs, activations = dy[tokens], x[tokens]
            for rows in tiles:
                values = tile[: rows.stop - rows.start]
                torch.matmul(theirs[:, rows].T, activations, out=values)
                sums = dtables[slot, rows]
                library().spallm_bucket_sums(
                    *_rows_arguments(codes, rows, columns, sums),
                    values.data_ptr(),
                    _TYPES[values.dtype],
                    sums.data_ptr(),
                    self.level,
                )
        return dtables

    def _linear(
        self,
        x: Tensor,
        codes: Tensor,
        tables: Tensor,
        scales: Tensor | None,
        slots: Tensor | None,
        bias: Tensor | None,
        *,
        blas: bool,
    ) -> Tensor:
        """Of many tokens of a slot by the BLAS, if it may; of others from the codes."""
        y = x.new_empty(x.shape[0], self.rows(codes))
        few = x.shape[0] < BLAS_TOKENS or os.environ.get(INVARIANT_VARIABLE) == "1"
        if few or not blas:
            self._multiply(x, codes, tables, scales, slots, bias, y)
            return y
        check_slots_in_range(slots, tables.shape[0])
        rest: list[Tensor] = []
        for slot, tokens in slot_runs(slots, x.shape[0]):
            if isinstance(tokens, Tensor) and len(tokens) < BLAS_TOKENS:
                rest.append(tokens)
                continue
            own = tables[slot] if scales is None else from_integers(tables[slot], scales[slot])
            self._multiply_by_tiles(x, codes, own, bias, y, tokens)
        if rest:
            assert slots is not None
            of_rest = torch.cat(rest)
            given = x.new_empty(len(of_rest), y.shape[1])
            self._multiply(x[of_rest], codes, tables, scales, slots[of_rest], bias, given)
            y[of_rest] = given
        return y

    def _multiply(
        self,
        x: Tensor,
        codes: Tensor,
        tables: Tensor,
        scales: Tensor | None,
        slots: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
    ) -> None:
        """From the codes, into ``y``; in parts where activations become integers."""
        tokens = x.shape[0]
        if scales is None or tokens <= _INTEGER_TOKENS:
            self._multiply_part(x, codes, tables, scales, slots, bias, y)
            return
        check_slots_in_range(slots, tables.shape[0])  # before any is done
        for start in range(0, tokens, _INTEGER_TOKENS):
            some = slice(start, start + _INTEGER_TOKENS)
            theirs = None if slots is None else slots[some]
            self._multiply_part(x[some], codes, tables, scales, theirs, bias, y[some])

    def _multiply_part(
        self,
        x: Tensor,
        codes: Tensor,
        tables: Tensor,
        scales: Tensor | None,
        slots: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
    ) -> None:
        rows, groups, entries = tables.shape[1:]
        refused = library().spallm_lut_linear(
            codes.data_ptr(),
            rows,
            x.shape[1],
            groups,
            entries.bit_length() - 1,
            tables.data_ptr(),
            _TYPES[tables.dtype] if scales is None else INTEGER_TYPES[tables.dtype],
            None if scales is None else scales.data_ptr(),
            tables.shape[0],
            x.data_ptr(),
            _TYPES[x.dtype],
            x.shape[0],
            None if slots is None else slots.data_ptr(),
            None if bias is None else bias.data_ptr(),
            0 if bias is None else _TYPES[bias.dtype],
            y.data_ptr(),
            self.level,
        )
        if refused == _OTHER_CODES:
            raise _other_codes(codes, tables, x.shape[1])
        if refused == _NO_INTEGERS:
            raise ValueError(f"tables: there are no products of integers with {LEVELS[self.level]}")
        if refused >= 0:
            assert slots is not None
            raise slot_error(slots, refused, tables.shape[0])

    def _multiply_by_tiles(
        self,
        x: Tensor,
        codes: Tensor,
        tables: Tensor,
        bias: Tensor | None,
        y: Tensor,
        tokens: Tensor | slice,
    ) -> None:
        dtype = self._blas_dtype(x.dtype)
        theirs = x[tokens].to(dtype)
        for rows, weight in self._tiles(codes, tables, x.shape[1], dtype):
            added = None if bias is None else bias[rows].to(dtype)
            y[tokens, rows] = F.linear(theirs, weight, added).to(y.dtype)

    def _tiles(
        self, codes: Tensor, tables: Tensor, columns: int, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their weight in ``dtype``; of one slot's tables ``[out, groups, entries]``.

        A tile is valid until the next one: they share their memory.
        """
        self._refuse_other_codes(codes, tables, columns)
        tiles = self._tile_rows(codes, columns, TILE_WEIGHTS)
        tile = torch.empty(tiles[0].stop if tiles else 0, columns, dtype=dtype)
        for rows in tiles:
            weight = tile[: rows.stop - rows.start]
            library().spallm_decode(
                *_rows_arguments(codes, rows, columns, tables),
                tables[rows].data_ptr(),
                _TYPES[tables.dtype],
                weight.data_ptr(),
                _TYPES[dtype],
                self.level,
            )
            yield rows, weight

    def _blas_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the BLAS multiplies in. It emulates bfloat16 at a third of the speed where there are
        no instructions for it, and float16, in which a sum over tokens may be out of range."""
        return dtype if self.rounds_tables(dtype) else torch.float32

    def _tile_rows(self, codes: Tensor, columns: int, weights: int) -> list[slice]:
        """All rows, as many at a time as have about ``weights`` weights."""
        count, height = self.rows(codes), max(1, weights // max(columns, 1))
        if height > _EVEN_ROWS:
            height -= height % _EVEN_ROWS
        return [slice(start, min(start + height, count)) for start in range(0, count, height)]

    def _refuse_other_codes(self, codes: Tensor, tables: Tensor, columns: int) -> None:
        rows, groups, entries = tables.shape
        if read_header(codes) != (rows, columns, groups, entries.bit_length() - 1):
            raise _other_codes(codes, tables, columns)


def _rows_arguments(
    codes: Tensor, rows: slice, columns: int, tables: Tensor
) -> tuple[int, int, int, int, int]:
    groups, entries = tables.shape[-2:]
    first = codes[1 + rows.start].data_ptr()
    return first, rows.stop - rows.start, columns, groups, entries.bit_length() - 1


def _other_codes(codes: Tensor, tables: Tensor, columns: int) -> ValueError:
    rows, theirs, groups, bits = read_header(codes)
    return ValueError(
        f"codes: are of {bits} bits, {rows} rows, {theirs} columns and {groups} groups; expected "
        f"those of tables {list(tables.shape)} and of x's {columns} columns"
    )
