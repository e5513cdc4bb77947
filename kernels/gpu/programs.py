"""The Triton programs: one pass over the codes for each block of rows.

Two ways to multiply, dequantize and bucket-sum, and the two gradients. All read the words of
:mod:`spallm_serve.kernels.gpu.layout`; tables, activations and results are as ``lut_linear`` has
them. A token whose slot has no tables gets NaN: raising would mean to wait for the device.
Offsets inside one matrix are 32 bits wide; only the tables of many slots take more.
"""

# Triton compiles what is written, so its own idioms stay; N803 and N806 are its constants.
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_codes(
    row_words, first_unit, units, BITS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    """Codes int32 ``[ROWS, 32 * UNITS]`` of a group whose rows begin at ``row_words``; those beyond
    the group's units are zero."""
    if BITS == 3:
        word = tl.arange(0, 2 * UNITS)
        unit = first_unit + word // 2
        at = unit * 3 + word % 2
        low = tl.load(row_words[:, None] + at[None, :], mask=(unit < units)[None, :], other=0)
        low = (low[:, :, None] >> (2 * tl.arange(0, 16))[None, None, :]) & 3
        top_unit = first_unit + tl.arange(0, UNITS)
        top = tl.load(
            row_words[:, None] + (top_unit * 3 + 2)[None, :],
            mask=(top_unit < units)[None, :],
            other=0,
        )
        top = (top[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        codes = tl.reshape(low, (ROWS, 32 * UNITS)) + 4 * tl.reshape(top, (ROWS, 32 * UNITS))
    else:
        word = tl.arange(0, BITS * UNITS)
        packed = tl.load(
            row_words[:, None] + (first_unit * BITS + word)[None, :],
            mask=(first_unit + word // BITS < units)[None, :],
            other=0,
        )
        shifts = BITS * tl.arange(0, 32 // BITS)
        fields = (packed[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
        codes = tl.reshape(fields, (ROWS, 32 * UNITS))
    return codes


@triton.jit
def tokens_of(
    block, block_slot, block_start, block_stop, tokens,
    SORTED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A block's slot and its part of the order of tokens; unsorted tokens are all of slot 0."""
    if SORTED:
        slot = tl.load(block_slot + block)
        start = tl.load(block_start + block)
        stop = tl.load(block_stop + block)
    else:
        slot = 0
        start = block * TOKENS
        stop = tl.minimum(start + TOKENS, tokens)
    return slot, start, stop


@triton.jit
def multiply_dequantized(
    x, codes, tables, bias, y, order, block_slot, block_start, block_stop,
    tokens, rows, columns, groups, units, words, n_slots,
    BITS: tl.constexpr, SORTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one slot times a block of rows, the weight looked up on the way.

    Grid: (blocks of tokens, blocks of rows); the codes of some rows serve all the blocks of tokens
    that run at the same time. One token is multiplied on the vector units, more on tensor cores.
    """
    block = tl.program_id(0)
    slot, start, stop = tokens_of(
        block, block_slot, block_start, block_stop, tokens, SORTED, TOKENS
    )
    if start >= stop:
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    place = start + tl.arange(0, TOKENS)
    has_token = place < stop
    token = tl.load(order + place, mask=has_token, other=0) if SORTED else place
    known = (slot >= 0) & (slot < n_slots)
    safe_slot = tl.where(known, slot, 0)
    safe_row = tl.where(has_row, row, 0)
    width = columns // groups
    slot_tables = tables + tl.cast(safe_slot, tl.int64) * rows * groups * (1 << BITS)
    row_tables = slot_tables + safe_row * groups * (1 << BITS)
    if TOKENS == 1:
        sums = tl.zeros((ROWS, 32 * UNITS), tl.float32)
    else:
        sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for group in range(groups):
        row_words = codes + (1 + safe_row) * words + group * units * BITS
        for first in range(0, units, UNITS):
            code = load_codes(row_words, first, units, BITS, ROWS, UNITS)
            column = first * 32 + tl.arange(0, 32 * UNITS)
            has_column = column < width
            weight = tl.load(row_tables[:, None] + group * (1 << BITS) + code)
            if TOKENS == 1:
                at = tl.sum(token) * columns + group * width + column
                given = tl.load(x + at, mask=has_column, other=0.0)
                sums += weight.to(tl.float32) * given.to(tl.float32)[None, :]
            else:
                at = token[None, :] * columns + (group * width + column)[:, None]
                mask = has_column[:, None] & has_token[None, :]
                given = tl.load(x + at, mask=mask, other=0.0)
                sums = tl.dot(weight.to(given.dtype), given, sums, input_precision="ieee")
    found = tl.sum(sums, axis=1)[:, None] if TOKENS == 1 else sums
    if HAS_BIAS:
        found += tl.load(bias + safe_row).to(tl.float32)[:, None]
    found = tl.where(known, found, float("nan"))
    at = token[None, :] * rows + row[:, None]
    tl.store(y + at, found.to(y.dtype.element_ty), mask=has_row[:, None] & has_token[None, :])


@triton.jit
def multiply_by_buckets(
    x, codes, tables, bias, y, slots,
    tokens, rows, columns, groups, units, words, n_slots,
    BITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Tokens of any slots times a block of rows: activations are summed by code on the tensor
    cores, ``S[k, r, t] = sum over columns with code k of x[t]``, and only the sums meet tables.

    Grid: (blocks of tokens, blocks of rows). What it costs does not depend on the slots.
    """
    K: tl.constexpr = 1 << BITS
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    has_token = place < tokens
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    safe_row = tl.where(has_row, row, 0)
    slot = tl.load(slots + place, mask=has_token, other=0).to(tl.int64)
    known = (slot >= 0) & (slot < n_slots)
    slot = tl.where(known, slot, 0)
    width = columns // groups
    kind = tl.arange(0, K)
    found = tl.zeros((ROWS, TOKENS), tl.float32)
    for group in range(groups):
        row_words = codes + (1 + safe_row) * words + group * units * BITS
        sums = tl.zeros((K * ROWS, TOKENS), tl.float32)
        for first in range(0, units, UNITS):
            code = load_codes(row_words, first, units, BITS, ROWS, UNITS)
            column = first * 32 + tl.arange(0, 32 * UNITS)
            at = place[None, :] * columns + (group * width + column)[:, None]
            mask = (column < width)[:, None] & has_token[None, :]
            given = tl.load(x + at, mask=mask, other=0.0)
            is_kind = code[None, :, :] == kind[:, None, None]
            one_hot = tl.reshape(is_kind.to(given.dtype), (K * ROWS, 32 * UNITS))
            sums = tl.dot(one_hot, given, sums, input_precision="ieee")
        at = ((slot[None, None, :] * rows + safe_row[None, :, None]) * groups + group) * K
        entries = tl.load(tables + at + kind[:, None, None]).to(tl.float32)
        found += tl.sum(tl.reshape(sums, (K, ROWS, TOKENS)) * entries, axis=0)
    if HAS_BIAS:
        found += tl.load(bias + safe_row).to(tl.float32)[:, None]
    found = tl.where(known[None, :], found, float("nan"))
    at = place[None, :] * rows + row[:, None]
    tl.store(y + at, found.to(y.dtype.element_ty), mask=has_row[:, None] & has_token[None, :])


@triton.jit
def multiply_transposed(
    dy, codes, tables, dx, order, block_slot, block_start, block_stop,
    tokens, rows, columns, groups, units, words, n_slots,
    BITS: tl.constexpr, SORTED: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """``dx = dy W`` for a block of tokens of one slot and a block of a group's columns.

    Grid: (blocks of tokens, groups, blocks of units).
    """
    block = tl.program_id(0)
    group = tl.program_id(1)
    slot, start, stop = tokens_of(
        block, block_slot, block_start, block_stop, tokens, SORTED, TOKENS
    )
    if start >= stop:
        return
    place = start + tl.arange(0, TOKENS)
    has_token = place < stop
    token = tl.load(order + place, mask=has_token, other=0) if SORTED else place
    known = (slot >= 0) & (slot < n_slots)
    safe_slot = tl.where(known, slot, 0)
    slot_tables = tables + tl.cast(safe_slot, tl.int64) * rows * groups * (1 << BITS)
    width = columns // groups
    first = tl.program_id(2) * UNITS
    column = first * 32 + tl.arange(0, 32 * UNITS)
    sums = tl.zeros((TOKENS, 32 * UNITS), tl.float32)
    for first_row in range(0, rows, ROWS):
        row = first_row + tl.arange(0, ROWS)
        has_row = row < rows
        safe_row = tl.where(has_row, row, 0)
        row_words = codes + (1 + safe_row) * words + group * units * BITS
        code = load_codes(row_words, first, units, BITS, ROWS, UNITS)
        row_tables = slot_tables + (safe_row * groups + group) * (1 << BITS)
        weight = tl.load(row_tables[:, None] + code)
        mask = has_token[:, None] & has_row[None, :]
        given = tl.load(dy + token[:, None] * rows + safe_row[None, :], mask=mask, other=0.0)
        sums = tl.dot(given, weight.to(given.dtype), sums, input_precision="ieee")
    sums = tl.where(known, sums, float("nan"))
    at = token[:, None] * columns + (group * width + column)[None, :]
    mask = has_token[:, None] & (column < width)[None, :]
    tl.store(dx + at, sums.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def sum_table_gradient(
    dy, x, codes, dtables, order, slot_start, slot_stop,
    rows, columns, groups, units, words,
    BITS: tl.constexpr, SORTED: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The gradient of one slot's tables of one group for a block of rows.

    A tile of ``dy^T x`` is made from the slot's tokens and summed by code while it is in registers;
    the weight's gradient never exists. Every sum has one program, so the result does not depend on
    which runs first.

    Grid: (blocks of rows, groups, slots).
    """
    K: tl.constexpr = 1 << BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    safe_row = tl.where(has_row, row, 0)
    group = tl.program_id(1)
    slot = tl.program_id(2)
    start = tl.load(slot_start + slot)
    stop = tl.load(slot_stop + slot)
    width = columns // groups
    row_words = codes + (1 + safe_row) * words + group * units * BITS
    kind = tl.arange(0, K)
    sums = tl.zeros((ROWS, K), tl.float32)
    for first in range(0, units, UNITS):
        column = first * 32 + tl.arange(0, 32 * UNITS)
        has_column = column < width
        tile = tl.zeros((ROWS, 32 * UNITS), tl.float32)
        for first_token in range(start, stop, TOKENS):
            place = first_token + tl.arange(0, TOKENS)
            has_token = place < stop
            token = tl.load(order + place, mask=has_token, other=0) if SORTED else place
            mask = has_row[:, None] & has_token[None, :]
            theirs = tl.load(dy + token[None, :] * rows + safe_row[:, None], mask=mask, other=0.0)
            at = token[:, None] * columns + (group * width + column)[None, :]
            given = tl.load(x + at, mask=has_token[:, None] & has_column[None, :], other=0.0)
            tile = tl.dot(theirs, given.to(theirs.dtype), tile, input_precision="ieee")
        code = load_codes(row_words, first, units, BITS, ROWS, UNITS)
        for k in tl.static_range(K):
            of_kind = tl.sum(tl.where(code == k, tile, 0.0), axis=1)
            sums += tl.where((kind == k)[None, :], of_kind[:, None], 0.0)
    at = (safe_row[:, None] * groups + group) * K + kind[None, :]
    slot_sums = dtables + tl.cast(slot, tl.int64) * rows * groups * K
    tl.store(slot_sums + at, sums, mask=has_row[:, None])
