"""Codes <-> words that a GPU reads side by side.

int32 ``[1 + out, words]``. Row 0 is a header: rows, columns, groups, bits. In the others every
group of columns begins anew and takes whole units of 32 columns, each of four *eights*: eight codes
that come out of their words as the eight nibbles of one, the leftmost column in the lowest. At 4
bits an eight is a word; at 2 bits two eights share one, the second two bits higher; at 3 bits so do
the lower two bits, and behind those of the whole group comes a word a unit with the top bits, bit
``4 i + e`` that of code ``i`` of the unit's eight ``e``. Rows are padded to 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.kernels.packing import pack_codes, unpack_codes

UNIT = 32
_EIGHTS = 4
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
    eights = padded.view(rows, groups, units * _EIGHTS, 8).int()
    low = _pack(eights & 3, 2) if bits < 4 else _pack(eights, 1)
    words = (low if bits != 3 else torch.cat([low, _pack(eights >> 2, 4)], dim=2)).view(rows, -1)
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
    words = laid[1:, : bits * groups * units].view(rows, groups, bits * units)
    codes = _unpack(words, 1, 15) if bits == 4 else _unpack(words[:, :, : 2 * units], 2, 3)
    if bits == 3:
        codes |= _unpack(words[:, :, 2 * units :], 4, 1) << 2
    grouped = codes.view(rows, groups, units * UNIT)[:, :, : columns // groups]
    return pack_codes(grouped.reshape(rows, columns).to(torch.uint8), bits)


def _pack(eights: Tensor, sharing: int) -> Tensor:
    """Put eights int32 ``[rows, groups, eights, 8]`` into words that so many of them share."""
    shared = eights.unflatten(2, (-1, sharing))
    return (shared << _shifts(sharing, eights)).sum(dim=(3, 4), dtype=torch.int32)


def _unpack(words: Tensor, sharing: int, mask: int) -> Tensor:
    """Inverse of :func:`_pack`: int32 ``[rows, groups, eights, 8]``."""
    return ((words[..., None, None] >> _shifts(sharing, words)) & mask).flatten(2, 3)


def _shifts(sharing: int, beside: Tensor) -> Tensor:
    """``[sharing, 8]``: a nibble for each code, each eight's own bits of it."""
    of_code = 4 * torch.arange(8, dtype=torch.int32, device=beside.device)
    of_eight = 4 // sharing * torch.arange(sharing, dtype=torch.int32, device=beside.device)
    return of_code + of_eight[:, None]
