"""What a backend is: a layout for codes, and the operation and its gradient on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """What is to be multiplied, as far as the choice of a backend depends on it.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: of the activations.
        bits: of the codes.
        rows, columns, groups: the layer's shape.
    """

    device: str
    dtype: torch.dtype
    bits: int
    rows: int
    columns: int
    groups: int


class Backend(Protocol):
    """One way to compute ``lut_linear``; see :mod:`spallm_serve.kernels.reference` for what it is.

    Attributes:
        name: as ``SPALLM_KERNEL`` and ``explain`` call it.
    """

    name: str

    def why_not(self, request: Request) -> str | None:
        """Why this backend cannot serve a request; None if it can."""
        ...

    def rounds_tables(self, dtype: torch.dtype) -> bool:
        """Whether every product with activations of a dtype is one with tables rounded to it."""
        ...

    def prepare(self, planes: Tensor, columns: int, groups: int) -> Tensor:
        """Codes from bit-planes in the layout that this backend reads."""
        ...

    def planes(self, codes: Tensor) -> Tensor:
        """Inverse of :meth:`prepare`."""
        ...

    def owns(self, codes: Tensor) -> bool:
        """Whether codes are in this backend's layout, by their dtype and rank."""
        ...

    def rows(self, codes: Tensor) -> int:
        """How many rows codes in this backend's layout have."""
        ...

    def check(self, codes: Tensor, columns: int, groups: int, bits: int) -> None:
        """Refuse codes of another shape than the tables and activations go with.

        Raises:
            ValueError: what was expected and what came.
        """
        ...

    def lut_linear(
        self, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The product; arguments are checked, but for the range of the slots."""
        ...

    def input_gradient(
        self, dy: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, columns: int
    ) -> Tensor:
        """``dy W``: ``[tokens, columns]`` in the dtype of ``dy``."""
        ...

    def table_gradient(
        self, dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None
    ) -> Tensor:
        """float32 in the shape of ``tables``, of which only the shape counts."""
        ...
