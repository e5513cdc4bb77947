"""Codes <-> bit-planes, the kernel-neutral layout that codes have on disk.

A matrix of codes ``[out, in]`` with values ``0 .. 2**bits - 1`` becomes ``bits`` planes of single
bits, uint8 ``[bits, out, ceil(in / 8)]``: plane 0 holds the lowest bit of every code, and within a
byte the lowest bit is the leftmost column. Three-bit codes take exactly three bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUPPORTED_BITS = (2, 3, 4)
_BITS_PER_BYTE = 8


def plane_width(columns: int) -> int:
    """Bytes that one row of ``columns`` codes takes in one plane."""
    return -(-columns // _BITS_PER_BYTE)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bit-planes.

    Args:
        codes: uint8 ``[out, in]``, every value below ``2**bits``.
        bits: 2, 3 or 4.

    Returns:
        uint8 ``[bits, out, ceil(in / 8)]``; the unused bits of a row's last byte are zero.

    Raises:
        ValueError: unsupported bits, wrong dtype or rank, or a code that does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes: expected uint8 [out, in], got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"codes: {int(codes.max())} does not fit in {bits} bits")
    rows, columns = codes.shape
    width = plane_width(columns)
    padded = torch.zeros(rows, width * _BITS_PER_BYTE, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = codes
    padded = padded.view(rows, width, _BITS_PER_BYTE)
    planes = torch.zeros(bits, rows, width, dtype=torch.uint8, device=codes.device)
    for plane in range(bits):
        for position in range(_BITS_PER_BYTE):
            planes[plane] |= ((padded[:, :, position] >> plane) & 1) << position
    return planes


def unpack_codes(planes: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`pack_codes`.

    Args:
        planes: uint8 ``[bits, out, ceil(columns / 8)]``.
        columns: how many codes a row has.

    Returns:
        uint8 ``[out, columns]``.

    Raises:
        ValueError: planes whose dtype or shape cannot hold ``columns`` codes a row.
    """
    check_planes(planes, columns)
    bits, rows, width = planes.shape
    codes = torch.zeros(rows, width, _BITS_PER_BYTE, dtype=torch.uint8, device=planes.device)
    for plane in range(bits):
        for position in range(_BITS_PER_BYTE):
            codes[:, :, position] |= ((planes[plane] >> position) & 1) << plane
    return codes.view(rows, width * _BITS_PER_BYTE)[:, :columns].contiguous()


def check_planes(planes: Tensor, columns: int) -> None:
    """Refuse what are no bit-planes of ``columns`` codes a row.

    Raises:
        ValueError: what was expected and what came.
    """
    if planes.dtype != torch.uint8 or planes.dim() != 3:
        raise ValueError(
            f"planes: expected uint8 [bits, out, bytes], got {planes.dtype} {list(planes.shape)}"
        )
    _check_bits(planes.shape[0])
    if planes.shape[2] != plane_width(columns):
        raise ValueError(
            f"planes: {columns} columns need {plane_width(columns)} bytes a row, "
            f"got {planes.shape[2]}"
        )


def _check_bits(bits: int) -> None:
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits: expected one of {SUPPORTED_BITS}, got {bits}")
