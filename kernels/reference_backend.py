"""The oracle as a backend: any device, any floating point type, codes as they are on disk."""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.kernels import reference
from spallm_serve.kernels.arguments import check_slots_in_range
from spallm_serve.kernels.backend import Request
from spallm_serve.kernels.packing import plane_width


class ReferenceBackend:
    """Plain torch on bit-planes; makes the dense weight in every call."""

    name = "reference"

    def why_not(self, request: Request) -> str | None:
        """It can do anything."""
        return None

    def rounds_tables(self, dtype: torch.dtype) -> bool:
        """Not promised."""
        return False

    def prepare(self, planes: Tensor, columns: int, groups: int) -> Tensor:
        """The bit-planes themselves."""
        return planes

    def planes(self, codes: Tensor) -> Tensor:
        """The codes themselves."""
        return codes

    def owns(self, codes: Tensor) -> bool:
        """Bit-planes are the only layout with three dimensions."""
        return codes.dim() == 3

    def rows(self, codes: Tensor) -> int:
        """The second dimension."""
        return codes.shape[1]

    def check(self, codes: Tensor, columns: int, groups: int, bits: int) -> None:
        """Refuse planes of another shape.

        Raises:
            ValueError: what was expected and what came.
        """
        wanted = [bits, codes.shape[1], plane_width(columns)]
        if list(codes.shape) != wanted:
            raise ValueError(
                f"codes: expected planes {wanted} for {bits} bits (the tables have {1 << bits} "
                f"entries) and {columns} columns, got {list(codes.shape)}"
            )

    def lut_linear(
        self, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See :func:`reference.lut_linear`."""
        check_slots_in_range(slots, tables.shape[0])
        return reference.lut_linear(x, codes, tables, slots, bias)

    def input_gradient(
        self, dy: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, columns: int
    ) -> Tensor:
        """See :func:`reference.input_gradient`."""
        return reference.input_gradient(dy, codes, tables, slots, columns)

    def table_gradient(
        self, dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None
    ) -> Tensor:
        """See :func:`reference.table_gradient`."""
        return reference.table_gradient(dy, x, codes, tables, slots)
