"""Codes to weights in a program: eights of codes, and tables looked up for them.

Entries of 16 bits are looked up in registers, see :mod:`spallm_serve.kernels.gpu.ptx`. Where
entries are wider, and under the interpreter, which knows no PTX, they are loaded.
"""

# Triton compiles what is written, so its own idioms stay: constants in capitals (N803), tuples that
# are added (RUF005), a dtype on the right of a comparison (SIM300).
# ruff: noqa: N803, RUF005, SIM300

from __future__ import annotations

import triton
import triton.language as tl

from spallm_serve.kernels.gpu.ptx import (
    DOT_2,
    DOT_3,
    DOT_4,
    DOT_F16_2,
    DOT_F16_3,
    DOT_F16_4,
    DOT_TYPES_2,
    DOT_TYPES_3,
    DOT_TYPES_4,
    WEIGHTS_2,
    WEIGHTS_3,
    WEIGHTS_4,
    WEIGHTS_TYPES_2,
    WEIGHTS_TYPES_3,
    WEIGHTS_TYPES_4,
)

_EIGHT_ENTRIES = tl.constexpr((tl.int16,) * 8)
_TWO_WORDS = tl.constexpr((tl.int32,) * 2)
_TWO_SINGLES = tl.constexpr((tl.float32,) * 2)


@triton.jit
def words_of(codes, row, group, units, quads, BITS: tl.constexpr):
    """Where the words of a group begin in each row ``[rows]``, which a header comes before."""
    return codes + (1 + row) * (4 * quads) + group * units * BITS


@triton.jit
def load_eights(row_words, first, units, BITS: tl.constexpr, EIGHTS: tl.constexpr):
    """Eights of codes int32 ``[rows, EIGHTS]``, from the ``first`` of a group whose rows begin at
    ``row_words`` ``[rows]``; those beyond the group's are zero."""
    eight = first + tl.arange(0, EIGHTS)
    inside = (eight < 4 * units)[None, :]
    if BITS == 4:
        codes = tl.load(row_words[:, None] + eight[None, :], mask=inside, other=0)
    else:
        codes = tl.load(row_words[:, None] + (eight // 2)[None, :], mask=inside, other=0)
        codes = (codes >> (2 * (eight % 2))[None, :]) & 0x33333333
    if BITS == 3:
        at = 2 * units + eight // 4
        top = tl.load(row_words[:, None] + at[None, :], mask=inside, other=0)
        codes |= ((top >> (eight % 4)[None, :]) & 0x11111111) << 2
    return codes


@triton.jit
def single_codes(eights, ROWS: tl.constexpr, EIGHTS: tl.constexpr):
    """int32 ``[ROWS, 8 * EIGHTS]`` of eights, in the columns' order."""
    codes = (eights[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    return tl.reshape(codes, (ROWS, 8 * EIGHTS))


@triton.jit
def table_of(row_tables, BITS: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """What :func:`dot_eights` and :func:`weights_of` look up in, for tables that begin at
    ``row_tables`` ``[rows, 1]``: registers with entries rounded to ``DTYPE``, or the pointers."""
    if not PTX:
        found = row_tables
    elif BITS == 2:
        found = _bytes_of_four(row_tables, 0, DTYPE)
    else:
        l0, h0 = _bytes_of_four(row_tables, 0, DTYPE)
        l1, h1 = _bytes_of_four(row_tables, 4, DTYPE)
        if BITS == 3:
            found = (l0, l1, h0, h1)
        else:
            l2, h2 = _bytes_of_four(row_tables, 8, DTYPE)
            l3, h3 = _bytes_of_four(row_tables, 12, DTYPE)
            found = (l0, l1, l2, l3, h0, h1, h2, h3)
    return found


@triton.jit
def _bytes_of_four(row_tables, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """Four entries as a word of their low bytes and one of their high bytes."""
    left = _two_entries(row_tables, FIRST, DTYPE)
    right = _two_entries(row_tables, FIRST + 2, DTYPE)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;", "=r,=r,r,r", [left, right],
        _TWO_WORDS, True, 1,
    )  # fmt: skip


@triton.jit
def _two_entries(row_tables, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """Two neighbouring entries in a dtype of 16 bits, as a word."""
    stored: tl.constexpr = row_tables.dtype.element_ty
    if stored == tl.float32:
        left = tl.load(row_tables + FIRST)
        right = tl.load(row_tables + FIRST + 1)
    else:
        pair = tl.load(row_tables.to(tl.pointer_type(tl.int32)) + FIRST // 2)
    if stored == DTYPE:
        found = pair
    else:
        if stored == tl.bfloat16:
            left = (pair << 16).to(tl.float32, bitcast=True)
            right = (pair & -65536).to(tl.float32, bitcast=True)
        elif stored == tl.float16:
            left, right = tl.inline_asm_elementwise(
                "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
                "=f,=f,r", [pair], _TWO_SINGLES, True, 1,
            )  # fmt: skip
        if DTYPE == tl.bfloat16:
            found = tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [left, right], tl.int32, True, 1
            )
        else:
            found = tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [left, right], tl.int32, True, 1
            )
    return found


@triton.jit
def dot_eights(sums, eights, table, x, BITS: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """``sums`` float32 ``[rows, EIGHTS]`` plus the products of each eight's weights with
    activations.

    Args:
        eights: int32 ``[rows, EIGHTS]``.
        table: of :func:`table_of`.
        x: of :func:`by_place`.
        DTYPE: of entries in registers.
    """
    if not PTX:
        for i in tl.static_range(8):
            sums += tl.load(table + ((eights >> (4 * i)) & 15)).to(tl.float32) * x[i]
    elif BITS == 2:
        asm: tl.constexpr = DOT_F16_2 if DTYPE == tl.float16 else DOT_2
        sums = tl.inline_asm_elementwise(
            asm, DOT_TYPES_2, (sums, eights) + table + x, tl.float32, True, 1
        )
    elif BITS == 3:
        asm: tl.constexpr = DOT_F16_3 if DTYPE == tl.float16 else DOT_3
        sums = tl.inline_asm_elementwise(
            asm, DOT_TYPES_3, (sums, eights) + table + x, tl.float32, True, 1
        )
    else:
        asm: tl.constexpr = DOT_F16_4 if DTYPE == tl.float16 else DOT_4
        sums = tl.inline_asm_elementwise(
            asm, DOT_TYPES_4, (sums, eights) + table + x, tl.float32, True, 1
        )
    return sums


@triton.jit
def weights_of(
    eights, table, BITS: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Weights ``[ROWS, 8 * EIGHTS]``, rounded to ``DTYPE``; arguments as for :func:`dot_eights`."""
    if not PTX:
        found = tl.load(table + single_codes(eights, ROWS, EIGHTS)).to(DTYPE)
    else:
        if BITS == 2:
            w = tl.inline_asm_elementwise(
                WEIGHTS_2, WEIGHTS_TYPES_2, (eights,) + table, _EIGHT_ENTRIES, True, 1
            )
        elif BITS == 3:
            w = tl.inline_asm_elementwise(
                WEIGHTS_3, WEIGHTS_TYPES_3, (eights,) + table, _EIGHT_ENTRIES, True, 1
            )
        else:
            w = tl.inline_asm_elementwise(
                WEIGHTS_4, WEIGHTS_TYPES_4, (eights,) + table, _EIGHT_ENTRIES, True, 1
            )
        even = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6]))
        odd = tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7]))
        found = tl.reshape(tl.join(even, odd), (ROWS, 8 * EIGHTS)).to(DTYPE, bitcast=True)
    return found


@triton.jit
def load_activations(x, first, width, EIGHTS: tl.constexpr):
    """A group's activations ``[EIGHTS, 8]`` from its eight ``first``; those beyond its width are
    zero."""
    column = 8 * (first + tl.arange(0, EIGHTS))[:, None] + tl.arange(0, 8)[None, :]
    return tl.load(x + column, mask=column < width, other=0.0)


@triton.jit
def by_place(activations, EIGHTS: tl.constexpr):
    """Activations as eight float32 ``[1, EIGHTS]``, the first with the first of each eight."""
    even, odd = tl.split(tl.reshape(activations.to(tl.float32), (1, EIGHTS, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def codes_as_halves(
    eights, BITS: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr
):
    """Codes as float16 ``[ROWS, 8 * EIGHTS]``, each another number: see :func:`half_of`."""
    if not PTX:
        found = half_of(single_codes(eights, ROWS, EIGHTS))
    elif BITS == 2:
        found = weights_of(eights, (0, 0x3F3E3D3C), BITS, PTX, tl.float16, ROWS, EIGHTS)
    elif BITS == 3:
        found = weights_of(
            eights, (0, 0, 0x3F3E3D3C, 0x43424140), BITS, PTX, tl.float16, ROWS, EIGHTS
        )
    else:
        found = weights_of(
            eights, (0, 0, 0, 0, 0x3F3E3D3C, 0x43424140, 0x47464544, 0x4B4A4948),
            BITS, PTX, tl.float16, ROWS, EIGHTS,
        )  # fmt: skip
    return found


@triton.jit
def half_of(code):
    """The float16 that stands for a code: 0x3C00 more than 256 times the code, from 1 to 14."""
    return ((code + 0x3C) << 8).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def is_code(codes, code, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """A number where ``codes`` are a code, zero where not: one, but in bfloat16 with PTX 2**-7.

    Two are compared at once, which gives a float16 one; as a bfloat16 its bits are 2**-7.
    """
    if PTX:
        found = tl.inline_asm_elementwise(
            "set.eq.f16x2.f16x2 $0, $1, $2;", "=r,r,r", [codes, half_of(code)], tl.float16, True, 2
        ).to(DTYPE, bitcast=True)
    else:
        found = (codes == half_of(code)).to(DTYPE)
    return found
