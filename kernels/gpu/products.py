"""The Triton programs that multiply: one pass over the codes for each block of rows.

All read the words of :mod:`spallm_serve.kernels.gpu.layout`; tables, activations and results are as
``lut_linear`` has them. A token whose slot has no tables gets NaN: raising would mean to wait for
the device. Offsets inside one matrix are 32 bits wide; only the tables of many slots take more.
"""

# Triton compiles what is written, so its own idioms stay; N803 and N806 are its constants.
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl

from spallm_serve.kernels.gpu.lookup import (
    by_place,
    codes_as_halves,
    dot_eights,
    is_code,
    load_activations,
    load_eights,
    table_of,
    weights_of,
    words_of,
)

# Sizes that change from call to call or layer to layer; a program for each kind of them (one,
# divisible by 16) would be compiled while a server answers. Rows of codes are whole quads of words,
# which says of their alignment what is needed.
UNSPECIALIZED = (
    "tokens", "units", "quads", "n_slots", "first_row", "part_eights", "most_slots", "parts_of_few",
    "parts_of_many",
)  # fmt: skip


@triton.jit
def slots_of_unit(slots, place, tokens, UNIT: tl.constexpr):
    """How many slots the unit of ``UNIT`` tokens has that token ``place`` is in."""
    member = place // UNIT * UNIT + tl.arange(0, UNIT)
    slot = tl.load(slots + member, mask=member < tokens, other=-1)
    same = (slot[:, None] == slot[None, :]) & (member[:, None] > member[None, :])
    is_first = (member < tokens) & (tl.max(same.to(tl.int32), axis=1) == 0)
    return tl.sum(is_first.to(tl.int32))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def multiply_each(
    x, codes, tables, bias, y, slots,
    tokens, rows, columns, groups, units, quads, n_slots,
    BITS: tl.constexpr, PTX: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """A token times a block of rows, whatever the other tokens' slots are.

    Grid: blocks of rows times tokens: programs that read the same codes run side by side, so that
    only one of them waits for memory.
    """
    token = tl.program_id(0) % tokens
    row = tl.program_id(0) // tokens * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    safe_row = tl.where(has_row, row, 0)
    slot = tl.load(slots + token) if HAS_SLOTS else 0
    known = (slot >= 0) & (slot < n_slots)
    safe_slot = tl.where(known, slot, 0)
    slot_tables = tables + tl.cast(safe_slot, tl.int64) * rows * groups * (1 << BITS)
    width = columns // groups
    sums = tl.zeros((ROWS, EIGHTS), tl.float32)
    for group in range(groups):
        row_words = words_of(codes, safe_row, group, units, quads, BITS)
        row_tables = slot_tables + (safe_row * groups + group)[:, None] * (1 << BITS)
        table = table_of(row_tables, BITS, PTX, x.dtype.element_ty)
        given = x + token * columns + group * width
        # The next codes and activations are on their way while these are multiplied.
        eights = load_eights(row_words, 0, units, BITS, EIGHTS)
        here = load_activations(given, 0, width, EIGHTS)
        for first in range(EIGHTS, 4 * units + EIGHTS, EIGHTS):
            next_eights = load_eights(row_words, first, units, BITS, EIGHTS)
            next_here = load_activations(given, first, width, EIGHTS)
            placed = by_place(here, EIGHTS)
            sums = dot_eights(sums, eights, table, placed, BITS, PTX, x.dtype.element_ty)
            eights = next_eights
            here = next_here
    found = tl.sum(sums, axis=1)
    if HAS_BIAS:
        found += tl.load(bias + safe_row).to(tl.float32)
    found = tl.where(known, found, float("nan"))
    tl.store(y + token * rows + row, found.to(y.dtype.element_ty), mask=has_row)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def multiply_blocks(
    x, codes, tables, parts, slots,
    tokens, rows, columns, groups, units, quads, n_slots, part_eights, most_slots,
    BITS: tl.constexpr, PTX: tl.constexpr, HAS_SLOTS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """A block of tokens times a block of rows on the tensor cores, one slot after another.

    Grid: (blocks of tokens, blocks of rows, parts): a part is ``part_eights`` of each group's
    columns, and what it finds is float32 in ``parts`` ``[parts, tokens, rows]``. A block with more
    than ``most_slots`` slots is left to :func:`multiply_by_buckets`.
    """
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    has_token = place < tokens
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    if HAS_SLOTS:
        if slots_of_unit(slots, tl.program_id(0) * TOKENS, tokens, TOKENS) > most_slots:
            return
        slot_of = tl.load(slots + place, mask=has_token, other=0)
        left = has_token.to(tl.int32)
        while tl.max(left) > 0:
            slot = tl.max(tl.where(left > 0, slot_of, -2147483648))
            mine = (left > 0) & (slot_of == slot)
            left = tl.where(mine, 0, left)
            safe_slot = tl.where((slot >= 0) & (slot < n_slots), slot, 0)
            sums = sums_of_slot(
                x, codes, tables, safe_slot, place, mine, row, part,
                rows, columns, groups, units, quads, part_eights,
                BITS, PTX, TOKENS, ROWS, EIGHTS,
            )  # fmt: skip
            # Not added to others': zeroed activations times an infinite entry are not zero.
            store_part(parts, sums, slot_of, mine, place, row, part, tokens, rows, n_slots)
    else:
        sums = sums_of_slot(
            x, codes, tables, 0, place, has_token, row, part,
            rows, columns, groups, units, quads, part_eights,
            BITS, PTX, TOKENS, ROWS, EIGHTS,
        )  # fmt: skip
        slot_of = tl.zeros((TOKENS,), tl.int32)
        store_part(parts, sums, slot_of, has_token, place, row, part, tokens, rows, n_slots)


@triton.jit
def sums_of_slot(
    x, codes, tables, slot, place, mine, row, part,
    rows, columns, groups, units, quads, part_eights,
    BITS: tl.constexpr, PTX: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One part of a slot's weight times those of a block's tokens that are ``mine``: float32
    ``[ROWS, TOKENS]``."""
    safe_row = tl.where(row < rows, row, 0)
    last = tl.minimum((part + 1) * part_eights, 4 * units)
    width = columns // groups
    slot_tables = tables + tl.cast(slot, tl.int64) * rows * groups * (1 << BITS)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for group in range(groups):
        row_words = words_of(codes, safe_row, group, units, quads, BITS)
        row_tables = slot_tables + (safe_row * groups + group)[:, None] * (1 << BITS)
        table = table_of(row_tables, BITS, PTX, x.dtype.element_ty)
        for first in range(part * part_eights, last, EIGHTS):
            eights = load_eights(row_words, first, units, BITS, EIGHTS)
            weight = weights_of(eights, table, BITS, PTX, x.dtype.element_ty, ROWS, EIGHTS)
            column = 8 * first + tl.arange(0, 8 * EIGHTS)
            at = place[None, :] * columns + (group * width + column)[:, None]
            mask = (column < width)[:, None] & mine[None, :]
            given = tl.load(x + at, mask=mask, other=0.0)
            sums = tl.dot(weight, given, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=UNSPECIALIZED)
def multiply_by_buckets(
    x, codes, tables, parts, slots,
    tokens, rows, columns, groups, units, quads, n_slots, part_eights, most_slots,
    BITS: tl.constexpr, PTX: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Tokens of any slots times a block of rows: activations are summed by code on the tensor
    cores, ``S[k, r, t] = sum over columns with code k of x[t]``, and only the sums meet tables.

    Grid: (blocks of tokens, blocks of rows, parts): a part is four of the codes on
    ``part_eights`` of each group's columns; see :func:`multiply_blocks`, which does the units of
    ``UNIT`` tokens with at most ``most_slots`` slots. What it costs does not depend on the slots.
    """
    K: tl.constexpr = 1 << BITS
    if slots_of_unit(slots, tl.program_id(0) * TOKENS, tokens, UNIT) <= most_slots:
        return
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    has_token = place < tokens
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    safe_row = tl.where(has_row, row, 0)
    slot_of = tl.load(slots + place, mask=has_token, other=0)
    known = (slot_of >= 0) & (slot_of < n_slots)
    slot = tl.where(known, slot_of, 0).to(tl.int64)
    part = tl.program_id(2)
    code = part % (K // 4) * 4
    begin = part // (K // 4) * part_eights
    last = tl.minimum(begin + part_eights, 4 * units)
    width = columns // groups
    dtype: tl.constexpr = x.dtype.element_ty
    scale: tl.constexpr = 128.0 if PTX and dtype == tl.bfloat16 else 1.0
    index = tl.arange(0, 8 * EIGHTS)
    identity = (index[:, None] == index[None, :]).to(tl.float16)
    found = tl.zeros((ROWS, TOKENS), tl.float32)
    for group in range(groups):
        row_words = words_of(codes, safe_row, group, units, quads, BITS)
        sums0 = tl.zeros((ROWS, TOKENS), tl.float32)
        sums1 = tl.zeros((ROWS, TOKENS), tl.float32)
        sums2 = tl.zeros((ROWS, TOKENS), tl.float32)
        sums3 = tl.zeros((ROWS, TOKENS), tl.float32)
        for first in range(begin, last, EIGHTS):
            eights = load_eights(row_words, first, units, BITS, EIGHTS)
            here = codes_as_halves(eights, BITS, PTX, ROWS, EIGHTS)
            if PTX:
                # The product's registers are laid out as the next product wants its operand, so
                # that what is compared does not go through shared memory four times.
                here = tl.dot(here, identity).to(tl.float16)
            column = 8 * first + index
            at = place[None, :] * columns + (group * width + column)[:, None]
            mask = (column < width)[:, None] & has_token[None, :]
            given = tl.load(x + at, mask=mask, other=0.0)
            ieee: tl.constexpr = "ieee"
            sums0 = tl.dot(is_code(here, code, PTX, dtype), given, sums0, input_precision=ieee)
            sums1 = tl.dot(is_code(here, code + 1, PTX, dtype), given, sums1, input_precision=ieee)
            sums2 = tl.dot(is_code(here, code + 2, PTX, dtype), given, sums2, input_precision=ieee)
            sums3 = tl.dot(is_code(here, code + 3, PTX, dtype), given, sums3, input_precision=ieee)
        at = ((slot[None, :] * rows + safe_row[:, None]) * groups + group) * K + code
        found += sums0 * tl.load(tables + at).to(tl.float32)
        found += sums1 * tl.load(tables + at + 1).to(tl.float32)
        found += sums2 * tl.load(tables + at + 2).to(tl.float32)
        found += sums3 * tl.load(tables + at + 3).to(tl.float32)
    store_part(parts, found * scale, slot_of, has_token, place, row, part, tokens, rows, n_slots)


@triton.jit
def store_part(parts, sums, slot_of, chosen, place, row, part, tokens, rows, n_slots):
    """One part's sums ``[rows, tokens]`` of the chosen tokens; if their slot has no tables, NaN."""
    known = (slot_of >= 0) & (slot_of < n_slots)
    sums = tl.where(known[None, :], sums, float("nan"))
    at = (part * tokens + place)[None, :] * rows + row[:, None]
    tl.store(parts + at, sums, mask=(row < rows)[:, None] & chosen[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_parts(
    parts, bias, y, slots, tokens, rows, parts_of_few, parts_of_many, most_slots,
    HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``y = bias`` plus a token's parts, as many as the program had that did its unit.

    Grid: (tokens, blocks of rows).
    """
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    count = parts_of_few
    if HAS_SLOTS:
        is_many = slots_of_unit(slots, token, tokens, UNIT) > most_slots
        count = tl.where(is_many, parts_of_many, parts_of_few)
    sums = tl.zeros((ROWS,), tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=has_row, other=0.0).to(tl.float32)
    for part in range(count):
        sums += tl.load(parts + (part * tokens + token) * rows + row, mask=has_row, other=0.0)
    tl.store(y + token * rows + row, sums.to(y.dtype.element_ty), mask=has_row)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dequantize(
    codes, tables, weights, first_row, rows, columns, groups, units, quads,
    BITS: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Rows of the dense weight of slot 0, from ``first_row`` on, for the BLAS.

    Grid: (blocks of rows, groups).
    """
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    safe_row = tl.where(has_row, row, 0)
    group = tl.program_id(1)
    width = columns // groups
    row_words = words_of(codes, safe_row, group, units, quads, BITS)
    row_tables = tables + (safe_row * groups + group)[:, None] * (1 << BITS)
    dtype: tl.constexpr = weights.dtype.element_ty
    table = table_of(row_tables, BITS, PTX, dtype)
    for first in range(0, 4 * units, EIGHTS):
        eights = load_eights(row_words, first, units, BITS, EIGHTS)
        weight = weights_of(eights, table, BITS, PTX, dtype, ROWS, EIGHTS)
        column = 8 * first + tl.arange(0, 8 * EIGHTS)
        at = (row - first_row)[:, None] * columns + (group * width + column)[None, :]
        tl.store(weights + at, weight, mask=has_row[:, None] & (column < width)[None, :])
