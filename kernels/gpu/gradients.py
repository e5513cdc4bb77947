"""The Triton program of the tables' gradient; see :mod:`spallm_serve.kernels.gpu.products`."""

# Triton compiles what is written, so its own idioms stay; N803 and N806 are its constants.
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl

from spallm_serve.kernels.gpu.lookup import load_eights, single_codes, words_of
from spallm_serve.kernels.gpu.products import UNSPECIALIZED

_ADD_IF_EQUAL = tl.constexpr(
    "{ .reg .pred equal; .reg .f32 sum; setp.eq.s32 equal, $2, $3; mov.f32 sum, $1; "
    "@equal add.f32 sum, sum, $4; mov.f32 $0, sum; }"
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sum_by_code(
    dense, codes, dtables, first_row, rows, columns, groups, units, quads,
    BITS: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """``dtables[r, g, k] = sum over the columns of g with code k of dense[r]``, in float32.

    Every sum has one program, so the result does not depend on which runs first.

    Grid: (blocks of rows, groups). ``dense`` has the rows from ``first_row`` on.
    """
    K: tl.constexpr = 1 << BITS
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    safe_row = tl.where(has_row, row, 0)
    group = tl.program_id(1)
    width = columns // groups
    row_words = words_of(codes, safe_row, group, units, quads, BITS)
    kind = tl.arange(0, K)
    sums = tl.zeros((K, ROWS, 8 * EIGHTS), tl.float32)
    for first in range(0, 4 * units, EIGHTS):
        code = single_codes(load_eights(row_words, first, units, BITS, EIGHTS), ROWS, EIGHTS)
        column = 8 * first + tl.arange(0, 8 * EIGHTS)
        at = (row - first_row)[:, None] * columns + (group * width + column)[None, :]
        mask = has_row[:, None] & (column < width)[None, :]
        value = tl.load(dense + at, mask=mask, other=0.0)
        if PTX:
            sums = tl.inline_asm_elementwise(
                _ADD_IF_EQUAL, "=f,f,r,r,f",
                [sums, code[None, :, :], kind[:, None, None], value[None, :, :]],
                tl.float32, True, 1,
            )  # fmt: skip
        else:
            sums += tl.where(code[None, :, :] == kind[:, None, None], value[None, :, :], 0.0)
    at = (safe_row[None, :] * groups + group) * K + kind[:, None]
    tl.store(dtables + at, tl.sum(sums, axis=2), mask=has_row[None, :])
