"""Codes <-> words that a GPU reads side by side.

int32 ``[1 + out, words]``. Row 0 is a header: rows, columns, groups, bits. In the others every
group of columns begins anew and takes whole units of 32 columns: at 4 bits four words of eight
codes, at 2 bits two of sixteen, at 3 bits two with the lower two bits of sixteen codes each and one
with the top bits of all. Within a word the lowest bits are the leftmost column. Rows are padded to
16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.kernels.packing import pack_codes, unpack_codes

UNIT = 32
_ALIGNED_WORDS = 4


def units_of(columns: int, groups: int) -> int:
    """Units of 32 columns that one group takes."""
    return -(-columns // groups // UNIT)


def row_words(columns: int, groups: int, bits: int) -> int:
    """Words in a row, padding included."""
    words = bits * groups * units_of(columns, groups)
    return -(-words // _ALIGNED_WORDS) * _ALIGNED_WORDS


def to_gpu_layout(planes: Tensor, columns: int, groups: int) -> Tensor:
    """Lay bit-planes out for the GPU.

    Args:
        planes: uint8 ``[bits, out, ceil(columns / 8)]``.
        columns: codes in a row.
        groups: column groups with a table each.

    Returns:
        int32 ``[1 + out, words]`` on the planes' device.

    Raises:
        ValueError: planes of another width, or groups that do not divide the columns.
    """
    if groups < 1 or columns % groups:
        raise ValueError(f"groups: expected a divisor of {columns} columns, got {groups}")
    codes = unpack_codes(planes, columns)
    bits, rows, width = planes.shape[0], codes.shape[0], columns // groups
    units = units_of(columns, groups)
    padded = codes.new_zeros(rows, groups, units * UNIT)
    padded[:, :, :width] = codes.view(rows, groups, width)
    units_first = padded.view(rows, groups * units, UNIT).long()
    parts = [_fields(units_first, bits)] if bits != 3 else [
        _fields(units_first & 3, 2), _fields(units_first >> 2, 1)
    ]  # fmt: skip
    words = torch.cat(parts, dim=2).view(rows, -1)
    laid = torch.zeros(
        1 + rows, row_words(columns, groups, bits), dtype=torch.int32, device=planes.device
    )
    laid[1:, : words.shape[1]] = words
    laid[0, :4] = torch.tensor([rows, columns, groups, bits], dtype=torch.int32)
    return laid


def from_gpu_layout(laid: Tensor) -> Tensor:
    """Inverse of :func:`to_gpu_layout`; reads the header, for which a GPU has to be waited for."""
    rows, columns, groups, bits = (int(word) for word in laid[0, :4].tolist())
    units = units_of(columns, groups)
    words = laid[1:, : bits * groups * units].view(rows, groups * units, bits)
    if bits == 3:
        codes = _split(words[:, :, :2], 2) | _split(words[:, :, 2:], 1) << 2
    else:
        codes = _split(words, bits)
    grouped = codes.view(rows, groups, units * UNIT)[:, :, : columns // groups]
    return pack_codes(grouped.reshape(rows, columns).to(torch.uint8), bits)


def _fields(values: Tensor, bits: int) -> Tensor:
    """Pack ``[rows, units, 32]`` small numbers into int32 ``[rows, units, bits]``."""
    count = 32 // bits
    shifts = bits * torch.arange(count, device=values.device)
    words = (values.view(*values.shape[:2], bits, count) << shifts).sum(dim=3)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _split(words: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_fields`: int32 ``[rows, units, 32]``."""
    count = 32 // bits
    shifts = bits * torch.arange(count, device=words.device, dtype=torch.int32)
    fields = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return fields.reshape(*words.shape[:2], UNIT)
