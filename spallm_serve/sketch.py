"""A sketch: the codes and tables of one linear layer, and the identity of a base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spallm_serve.kernels.packing import pack_codes, plane_width, unpack_codes
from spallm_serve.kernels.reference import dequantize

_LOOKED_UP_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Sketch:
    """Codes and tables of one layer, as they are on disk.

    Attributes:
        planes: uint8 ``[bits, out, ceil(in / 8)]``, the codes as bit-planes.
        tables: float16 ``[out, groups, 2**bits]``.
        columns: the layer's input width, which the planes' last byte may exceed.
    """

    planes: Tensor
    tables: Tensor
    columns: int

    @classmethod
    def from_codes(cls, codes: Tensor, tables: Tensor) -> Sketch:
        """Pack codes, uint8 ``[out, in]``; the tables, ``[out, groups, 2**bits]``, become float16.

        Raises:
            ValueError: a table entry is not finite in float16.
        """
        bits = tables.shape[2].bit_length() - 1
        half = tables.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ValueError("tables: a value does not fit in float16")
        return cls(pack_codes(codes, bits), half.contiguous(), codes.shape[1])

    @property
    def bits(self) -> int:
        """Bits a code takes."""
        return self.planes.shape[0]

    @property
    def codes(self) -> Tensor:
        """uint8 ``[out, in]``."""
        return unpack_codes(self.planes, self.columns)

    @property
    def weight_count(self) -> int:
        """How many weights the sketch stands for."""
        return self.planes.shape[1] * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of codes and tables together, the padding of rows to whole bytes included."""
        return self.planes.nbytes + self.tables.nbytes

    def weight(self) -> Tensor:
        """The dense weight it stands for: float32 ``[out, in]``."""
        weight = torch.empty(self.planes.shape[1], self.columns, device=self.planes.device)
        self.copy_to(weight)
        return weight

    def copy_to(self, weight: Tensor) -> None:
        """Overwrite a floating point tensor ``[out, in]`` by the weight it stands for.

        Some rows at a time, since looking up takes a multiple of a matrix's memory.
        """
        height = max(1, _LOOKED_UP_WEIGHTS // max(self.columns, 1))
        for start in range(0, len(weight), height):
            rows = slice(start, start + height)
            codes = unpack_codes(self.planes[:, rows], self.columns)
            weight[rows] = dequantize(codes, self.tables[rows].float())


def sketch_nbytes(rows: int, columns: int, bits: int, groups_per_row: int) -> int:
    """Bytes that a layer's codes and tables take on disk."""
    return bits * rows * plane_width(columns) + 2 * rows * groups_per_row * (1 << bits)


def base_digest(planes: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """The identity of a base: sha256 over the codes of every layer in name order.

    Name and shape of each layer go in too, so that moving bytes between layers shows.

    Args:
        planes: module name -> uint8 bit-planes; an iterable must come in name order.

    Returns:
        64 hexadecimal digits.
    """
    items = sorted(planes.items()) if isinstance(planes, Mapping) else planes
    digest = hashlib.sha256()
    for name, layer in items:
        digest.update(f"{name} {list(layer.shape)}\n".encode())
        digest.update(layer.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
