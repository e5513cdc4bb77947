"""Bit-planes to the layout that the C++ kernels read (see ``csrc/layout.h``)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spallm_serve.kernels.packing import pack_codes, plane_width, unpack_codes

STEP_COLUMNS = 32
CHUNK_BYTES = 64
# Of 3 and 4 bits: the steps whose codes fill whole words of 16 bits, and those words.
_BLOCK_STEPS = {3: 16, 4: 4}
_BLOCK_WORDS = {3: 3, 4: 1}
_PAIR_STEPS = 8  # of 2 bits: steps that a word of 32 bits holds
# Intermediate int64 values take 8 bytes a code; rows are independent, so they go in chunks.
_CHUNK_CODES = 1 << 20


def row_bytes(columns: int, groups: int, bits: int) -> int:
    """Bytes that one row of codes takes."""
    steps = -(-(columns // groups) // STEP_COLUMNS)
    chunks = -(-steps // _PAIR_STEPS) if bits == 2 else -(-bits * steps // 16)
    return groups * chunks * CHUNK_BYTES


def to_cpu_layout(planes: Tensor, columns: int, groups: int) -> Tensor:
    """Repack codes for the native kernels.

    Args:
        planes: uint8 ``[bits, out, ceil(columns / 8)]``, bit-planes as on disk.
        columns: codes in a row.
        groups: column groups with a table each; divides ``columns``.

    Returns:
        uint8 ``[1 + out, row_bytes]``; every row starts on 64 bytes. The first one says what the
        others are (see :func:`read_header`), since different codes can take as many bytes.

    Raises:
        ValueError: as :func:`unpack_codes`, or groups that do not divide the columns.
    """
    if columns % groups:
        raise ValueError(f"groups: {groups} does not divide {columns} columns")
    bits, rows, _ = planes.shape
    packed = torch.zeros(1 + rows, row_bytes(columns, groups, bits), dtype=torch.uint8)
    header = torch.tensor([rows, columns, groups, bits])
    packed[0, : header.nbytes] = header.view(torch.uint8)
    chunk = max(1, _CHUNK_CODES // max(columns, 1))
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        codes = unpack_codes(planes[:, start:stop], columns)
        packed[1 + start : 1 + stop] = _pack_rows(codes, groups, bits)
    return packed


def from_cpu_layout(packed: Tensor) -> Tensor:
    """Inverse of :func:`to_cpu_layout`: uint8 ``[bits, out, ceil(columns / 8)]``."""
    rows, columns, groups, bits = read_header(packed)
    planes = torch.empty(bits, rows, plane_width(columns), dtype=torch.uint8)
    chunk = max(1, _CHUNK_CODES // max(columns, 1))
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        codes = _unpack_rows(packed[1 + start : 1 + stop], columns, groups, bits)
        planes[:, start:stop] = pack_codes(codes, bits)
    return planes


def read_header(packed: Tensor) -> tuple[int, int, int, int]:
    """Rows, columns, groups and bits of codes in this layout."""
    rows, columns, groups, bits = packed[0, :32].view(torch.int64).tolist()
    return rows, columns, groups, bits


def _pack_rows(codes: Tensor, groups: int, bits: int) -> Tensor:
    rows, columns = codes.shape
    grouped = codes.view(rows, groups, columns // groups)
    # A padding column repeats the last one, so that it never looks up an entry of its own.
    padding = -grouped.shape[2] % STEP_COLUMNS
    last = grouped[:, :, -1:].expand(-1, -1, padding)
    steps = torch.cat([grouped, last], dim=2).view(rows, groups, -1, STEP_COLUMNS).long()
    pack = _pack_pairs if bits == 2 else _pack_words
    return pack(steps, bits).contiguous().view(torch.uint8).view(rows, -1)


def _pack_pairs(steps: Tensor, bits: int) -> Tensor:
    pairs = steps[..., 0::2] | (steps[..., 1::2] << bits)
    rows, groups, count, lanes = pairs.shape
    pairs = F.pad(pairs, (0, 0, 0, -count % _PAIR_STEPS))
    blocks = pairs.view(rows, groups, -1, _PAIR_STEPS, lanes)
    return _stream(blocks, 2 * bits).to(torch.int32)


def _pack_words(steps: Tensor, bits: int) -> Tensor:
    rows, groups, count, lanes = steps.shape
    steps = F.pad(steps, (0, 0, 0, -count % _BLOCK_STEPS[bits]))
    stream = _stream(steps.view(rows, groups, -1, _BLOCK_STEPS[bits], lanes), bits)
    words = torch.stack([stream >> (16 * word) for word in range(_BLOCK_WORDS[bits])], dim=3)
    words = words.view(rows, groups, -1, lanes)[:, :, : -(-bits * count // 16)]
    return (words & 0xFFFF).to(torch.int32).to(torch.int16)


def _unpack_rows(packed: Tensor, columns: int, groups: int, bits: int) -> Tensor:
    rows = packed.shape[0]
    if bits == 2:
        words = packed.view(torch.int32).long().view(rows, groups, -1, STEP_COLUMNS // 2)
        pairs = _parts(words, 2 * bits, _PAIR_STEPS)
        steps = torch.stack([pairs & 3, pairs >> bits], dim=-1).flatten(-2)
    else:
        words = packed.view(torch.int16).long().view(rows, groups, -1, STEP_COLUMNS) & 0xFFFF
        words = F.pad(words, (0, 0, 0, -words.shape[2] % _BLOCK_WORDS[bits]))
        blocks = words.view(rows, groups, -1, _BLOCK_WORDS[bits], STEP_COLUMNS)
        steps = _parts(_stream(blocks, 16), bits, _BLOCK_STEPS[bits])
    flat = steps.reshape(rows, groups, -1)[:, :, : columns // groups]
    return flat.to(torch.uint8).reshape(rows, columns)


def _parts(streams: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`_stream`: ``count`` values of each element, as a new dimension 3."""
    shifts = bits * torch.arange(count).view(-1, 1)
    return (streams.unsqueeze(3) >> shifts) & ((1 << bits) - 1)


def _stream(blocks: Tensor, bits: int) -> Tensor:
    """Concatenate the values of dimension 3, ``bits`` each, the first one lowest."""
    shifts = bits * torch.arange(blocks.shape[3]).view(-1, 1)
    return (blocks << shifts).sum(dim=3)
