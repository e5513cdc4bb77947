"""The lookup's PTX, which neither the interpreter nor a compiler's success says anything about.

A small machine runs the lines: enough of ``prmt``, ``lop3``, shifts and masks to check them here.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from spallm_serve.kernels.gpu.ptx import lookup_ptx

WORD = 0xFFFFFFFF


def permute(a: int, b: int, selector: int) -> int:
    """``prmt.b32``: four bytes of eight; a nibble with its top bit set would repeat a sign."""
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    assert max(nibbles) < 8
    return int.from_bytes(bytes(pool[nibble] for nibble in nibbles), "little")


def logic(a: int, b: int, c: int, table: int) -> int:
    """``lop3.b32``: a bit of ``table`` for each bit of the three."""
    found = 0
    for i in range(32):
        index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
        found |= (table >> index & 1) << i
    return found


OPERATIONS = {
    "prmt.b32": permute,
    "lop3.b32": logic,
    "shr.u32": lambda a, count: a >> count,
    "and.b32": lambda a, b: a & b,
    "mov.b32": lambda a: a,
}


def run(lines: list[str], registers: dict[str, int]) -> dict[str, int]:
    """The registers after the lines; one that is read before it is written is an error."""
    for line in lines:
        parts = re.fullmatch(r"(\S+) (\w+), ([^;]+);", line)
        assert parts is not None, line
        values = [
            int(operand, 16 if operand.startswith("0x") else 10)
            if operand[0].isdigit()
            else registers[operand]
            for operand in parts[3].split(", ")
        ]
        registers[parts[2]] = OPERATIONS[parts[1]](*values) & WORD
    return registers


@given(data=st.data())
def test_eight_codes_find_their_entries(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 3, 4]))
    entries = data.draw(
        st.lists(st.integers(0, 0xFFFF), min_size=1 << bits, max_size=1 << bits), label="entries"
    )
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=8, max_size=8))
    registers = {"codes": sum(code << 4 * i for i, code in enumerate(codes))}
    names = []
    for kind, shift in (("l", 0), ("h", 8)):
        for first in range(0, 1 << bits, 4):
            names.append(f"{kind}{first}")
            four = [entry >> shift & 0xFF for entry in entries[first : first + 4]]
            registers[names[-1]] = int.from_bytes(bytes(four), "little")
    found = run(lookup_ptx(bits, "codes", names), registers)
    halves = [found[f"w{i // 2}"] >> 16 * (i % 2) & 0xFFFF for i in range(8)]
    assert halves == [entries[code] for code in codes]
