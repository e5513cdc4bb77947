"""The layout of codes that the C++ kernels read (``csrc/layout.h`` says what it is)."""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.kernels.cpu.library import library
from spallm_serve.kernels.packing import check_planes, plane_width

STEP_COLUMNS = 32
CHUNK_BYTES = 64
_HEADER_BYTES = 32


def row_bytes(columns: int, groups: int, bits: int) -> int:
    """Bytes that one row of codes takes."""
    steps = -(-(columns // groups) // STEP_COLUMNS)
    chunks = -(-steps // 8) if bits == 2 else -(-bits * steps // 16)
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
        ValueError: planes that cannot hold ``columns`` codes a row, or groups that do not divide
            the columns.
    """
    check_planes(planes, columns)
    if columns % groups:
        raise ValueError(f"groups: {groups} does not divide {columns} columns")
    bits, rows, _ = planes.shape
    packed = torch.zeros(1 + rows, row_bytes(columns, groups, bits), dtype=torch.uint8)
    library().spallm_pack(
        planes.contiguous().data_ptr(), rows, columns, groups, bits, packed.data_ptr()
    )
    return packed


def from_cpu_layout(packed: Tensor) -> Tensor:
    """Inverse of :func:`to_cpu_layout`: uint8 ``[bits, out, ceil(columns / 8)]``."""
    rows, columns, groups, bits = read_header(packed)
    planes = torch.zeros(bits, rows, plane_width(columns), dtype=torch.uint8)
    library().spallm_unpack(planes.data_ptr(), rows, columns, groups, bits, packed.data_ptr())
    return planes


def read_header(packed: Tensor) -> tuple[int, int, int, int]:
    """Rows, columns, groups and bits of codes in this layout."""
    rows, columns, groups, bits = packed[0, :_HEADER_BYTES].view(torch.int64).tolist()
    return rows, columns, groups, bits
