"""The PTX that looks codes up in tables that lie in registers, made as text.

A table of 16-bit entries lies in registers as its low and its high bytes. ``prmt`` then picks four
bytes by four codes at once: eight codes take 4 to 16 of them, a third to a half of what eight
loads through the first-level cache do, each with an address to make.
"""

from __future__ import annotations

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


WEIGHTS_2, WEIGHTS_3, WEIGHTS_4 = (_weights_asm(bits) for bits in (2, 3, 4))
WEIGHTS_TYPES_2, WEIGHTS_TYPES_3, WEIGHTS_TYPES_4 = (
    _weights_constraints(bits) for bits in (2, 3, 4)
)
DOT_2, DOT_3, DOT_4 = (_dot_asm(bits, halves=False) for bits in (2, 3, 4))
DOT_F16_2, DOT_F16_3, DOT_F16_4 = (_dot_asm(bits, halves=True) for bits in (2, 3, 4))
DOT_TYPES_2, DOT_TYPES_3, DOT_TYPES_4 = (_dot_constraints(bits) for bits in (2, 3, 4))
