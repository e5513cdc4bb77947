"""Codes to weights in a program: eights of codes, and tables looked up in registers.

A table of 16-bit entries lies in registers as its low and its high bytes. ``prmt`` then picks four
bytes by four codes at once: eight codes take 4 to 16 of them, a third to a half of what eight
loads through the first-level cache do, each with an address to make. Where entries are wider than
16 bits, and under the interpreter, which knows no PTX, the entries are loaded.
"""

# Triton compiles what is written, so its own idioms stay: constants in capitals (N803), tuples that
# are added (RUF005), a dtype on the right of a comparison (SIM300).
# ruff: noqa: N803, RUF005, SIM300

from __future__ import annotations

import triton
import triton.language as tl


def lookup_ptx(bits: int, codes: str, tables: list[str]) -> list[str]:
    """Lines that look eight codes up; register ``w0`` to ``w3`` get two 16-bit entries each.

    Args:
        bits: of a code.
        codes: the register with the codes, one a nibble.
        tables: those with the low bytes of all entries, four a register, then those with the high.
    """
    low, high = tables[: len(tables) // 2], tables[len(tables) // 2 :]
    lines = []
    if bits == 4:
        # A selector has three bits for a byte out of eight: both halves of the table are looked
        # up, and the codes' fourth bits select between them.
        lines += [
            f"shr.u32 half, {codes}, 1;",
            "lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;",
            f"and.b32 code, {codes}, 0x77777777;",
        ]
    else:
        lines.append(f"mov.b32 code, {codes};")
    for four in range(2):
        if four:
            lines.append("shr.u32 code, code, 16;")
            lines += ["shr.u32 half, half, 16;"] if bits == 4 else []
        for found, table in (("low", low), ("high", high)):
            if bits == 4:
                lines += [
                    f"prmt.b32 below, {table[0]}, {table[1]}, code;",
                    f"prmt.b32 above, {table[2]}, {table[3]}, code;",
                    f"prmt.b32 {found}, below, above, half;",
                ]
            else:
                lines.append(f"prmt.b32 {found}, {table[0]}, {table[-1]}, code;")
        lines += [
            f"prmt.b32 w{2 * four}, low, high, 0x5140;",
            f"prmt.b32 w{2 * four + 1}, low, high, 0x7362;",
        ]
    return lines


_LOOKUP_REGISTERS = ".reg .b32 half, code, below, above, low, high, w0, w1, w2, w3;"


def _asm(body: list[str]) -> tl.constexpr:
    return tl.constexpr("\n".join(["{", *body, "}"]))


def _constraints(outputs: str, inputs: str) -> tl.constexpr:
    return tl.constexpr(",".join([*(f"={kind}" for kind in outputs), *inputs]))


def _weights_asm(bits: int) -> tl.constexpr:
    """Out: eight 16-bit entries. In: codes, tables."""
    tables = [f"${9 + i}" for i in range(_table_registers(bits))]
    split = [f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, w{pair};" for pair in range(4)]
    return _asm([_LOOKUP_REGISTERS, *lookup_ptx(bits, "$8", tables), *split])


def _dot_asm(bits: int, halves: bool) -> tl.constexpr:
    """Out: a float32 sum. In: the sum so far, codes, tables, eight float32 activations."""
    tables = [f"${3 + i}" for i in range(_table_registers(bits))]
    given = [f"${3 + len(tables) + i}" for i in range(8)]
    lines = [
        _LOOKUP_REGISTERS,
        ".reg .b32 wide0, wide1;",
        ".reg .b16 entry0, entry1;",
        ".reg .f32 left, right, sum;",
        "mov.f32 sum, $1;",
        *lookup_ptx(bits, "$2", tables),
    ]
    for pair in range(4):
        if halves:
            lines += [
                f"mov.b32 {{entry0, entry1}}, w{pair};",
                "cvt.f32.f16 left, entry0;",
                "cvt.f32.f16 right, entry1;",
            ]
        else:
            lines += [
                f"shl.b32 wide0, w{pair}, 16;",
                f"and.b32 wide1, w{pair}, 0xffff0000;",
                "mov.b32 left, wide0;",
                "mov.b32 right, wide1;",
            ]
        lines += [
            f"fma.rn.f32 sum, left, {given[2 * pair]}, sum;",
            f"fma.rn.f32 sum, right, {given[2 * pair + 1]}, sum;",
        ]
    return _asm([*lines, "mov.f32 $0, sum;"])


def _table_registers(bits: int) -> int:
    return 2 * max(1, (1 << bits) // 4)


def _dot_constraints(bits: int) -> tl.constexpr:
    return _constraints("f", "fr" + "r" * _table_registers(bits) + "f" * 8)


def _weights_constraints(bits: int) -> tl.constexpr:
    return _constraints("h" * 8, "r" + "r" * _table_registers(bits))


_EIGHT_ENTRIES = tl.constexpr((tl.int16,) * 8)
_TWO_WORDS = tl.constexpr((tl.int32,) * 2)
_TWO_SINGLES = tl.constexpr((tl.float32,) * 2)
_WEIGHTS_2, _WEIGHTS_3, _WEIGHTS_4 = (_weights_asm(bits) for bits in (2, 3, 4))
_WEIGHTS_TYPES_2, _WEIGHTS_TYPES_3, _WEIGHTS_TYPES_4 = (
    _weights_constraints(bits) for bits in (2, 3, 4)
)
_DOT_2, _DOT_3, _DOT_4 = (_dot_asm(bits, halves=False) for bits in (2, 3, 4))
_DOT_F16_2, _DOT_F16_3, _DOT_F16_4 = (_dot_asm(bits, halves=True) for bits in (2, 3, 4))
_DOT_TYPES_2, _DOT_TYPES_3, _DOT_TYPES_4 = (_dot_constraints(bits) for bits in (2, 3, 4))


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
        asm: tl.constexpr = _DOT_F16_2 if DTYPE == tl.float16 else _DOT_2
        sums = tl.inline_asm_elementwise(
            asm, _DOT_TYPES_2, (sums, eights) + table + x, tl.float32, True, 1
        )
    elif BITS == 3:
        asm: tl.constexpr = _DOT_F16_3 if DTYPE == tl.float16 else _DOT_3
        sums = tl.inline_asm_elementwise(
            asm, _DOT_TYPES_3, (sums, eights) + table + x, tl.float32, True, 1
        )
    else:
        asm: tl.constexpr = _DOT_F16_4 if DTYPE == tl.float16 else _DOT_4
        sums = tl.inline_asm_elementwise(
            asm, _DOT_TYPES_4, (sums, eights) + table + x, tl.float32, True, 1
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
                _WEIGHTS_2, _WEIGHTS_TYPES_2, (eights,) + table, _EIGHT_ENTRIES, True, 1
            )
        elif BITS == 3:
            w = tl.inline_asm_elementwise(
                _WEIGHTS_3, _WEIGHTS_TYPES_3, (eights,) + table, _EIGHT_ENTRIES, True, 1
            )
        else:
            w = tl.inline_asm_elementwise(
                _WEIGHTS_4, _WEIGHTS_TYPES_4, (eights,) + table, _EIGHT_ENTRIES, True, 1
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
