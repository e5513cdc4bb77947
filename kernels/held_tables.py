"""The tables of a layer's slots, in the form that its products take them in fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from spallm_serve.kernels.backend import Backend
from spallm_serve.kernels.choice import integers_held, rounds_tables
from spallm_serve.kernels.cpu.backend import CpuBackend
from spallm_serve.kernels.cpu.integers import to_integers, to_integers_together
from spallm_serve.kernels.dispatch import lut_linear


@dataclass(frozen=True)
class HeldTables:
    """Tables of all slots, or of some rows of one.

    Attributes:
        entries: ``[slots, out, groups, 2**bits]`` or ``[out, groups, 2**bits]``; as they came, or
            in the dtype of the activations where kernels round them to it anyway, or as integers
            where those are multiplied faster.
        scales: float32 ``[slots, out]`` or ``[out]`` of integers
            (:func:`~spallm_serve.kernels.cpu.integers.to_integers`); else None.
    """

    entries: Tensor
    scales: Tensor | None = None

    @classmethod
    def of(cls, tables: Tensor, slots: int, dtype: torch.dtype) -> Self:
        """The same tables in every slot.

        Args:
            tables: floating point ``[out, groups, 2**bits]``.
            slots: how many.
            dtype: of the activations.

        Raises:
            ValueError: integers were asked for, and this processor has no instructions for them.
        """
        device = tables.device.type
        integers = integers_held(device, dtype)
        if integers is not None:
            entries, scales = to_integers(tables, integers)
            return cls(entries.repeat(slots, 1, 1, 1), scales.repeat(slots, 1))
        if rounds_tables(device, dtype):
            tables = tables.to(dtype)
        return cls(tables.repeat(slots, 1, 1, 1))

    def alike(self, tables: Tensor) -> Self:
        """Other tables ``[..., groups, 2**bits]`` in the form that these have."""
        if self.scales is not None:
            return type(self)(*to_integers(tables, self.entries.dtype))
        return type(self)(tables.to(self.entries.dtype))

    def alike_together(self, tables: Sequence[Tensor]) -> list[Self]:
        """What :meth:`alike` gives for each of several ``[out, groups, 2**bits]`` of one shape but
        for their rows; in a few calls for all."""
        if self.scales is not None:
            together = to_integers_together(tables, self.entries.dtype)
            return [type(self)(*each) for each in together]
        return [self.alike(each.contiguous()) for each in tables]

    @property
    def nbytes(self) -> int:
        """What they take."""
        return self.entries.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def slot_bytes(self) -> int:
        """What those of one slot take."""
        return self.nbytes // len(self.entries)

    def rows(self, slot: int, start: int, stop: int) -> Self:
        """Some rows of a slot; the same memory."""
        scales = None if self.scales is None else self.scales[slot, start:stop]
        return type(self)(self.entries[slot, start:stop], scales)

    def copy_(self, other: HeldTables) -> None:
        """Overwrite these with others of the same form and shape."""
        self.entries.copy_(other.entries)
        if self.scales is not None:
            assert other.scales is not None
            self.scales.copy_(other.scales)

    def replaced(self, rows: Tensor, other: HeldTables) -> Self:
        """These rows of one slot, some of them, int64 ``[n]``, as the others ``[n, ...]`` are."""
        entries = self.entries.index_copy(0, rows, other.entries.to(self.entries.device))
        if self.scales is None:
            return type(self)(entries)
        assert other.scales is not None
        scales = self.scales.index_copy(0, rows, other.scales.to(self.scales.device))
        return type(self)(entries, scales)

    @cached_property
    def _alone(self) -> list[tuple[Tensor, Tensor | None]]:
        """Each slot as if it were the only one: to make a view takes as long as a small product."""
        with torch.inference_mode(False):  # or they could not take part in anything else later
            return [
                (self.entries[slot, None], None if self.scales is None else self.scales[slot, None])
                for slot in range(len(self.entries))
            ]

    def linear(
        self, x: Tensor, codes: Tensor, backend: Backend, slots: Tensor | None, only: int
    ) -> Tensor:
        """``x [tokens, in] -> [tokens, out]``; of integers without gradients.

        Args:
            x: contiguous activations.
            codes: prepared for them.
            backend: whose layout the codes are in.
            slots: int32 ``[tokens]``, or None where all tokens use the same slot.
            only: that slot.
        """
        entries, scales = (self.entries, self.scales) if slots is not None else self._alone[only]
        if scales is not None:
            assert isinstance(backend, CpuBackend)
            return backend.integer_linear(x, codes, entries, scales, slots)
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return lut_linear(x, codes, entries, slots)
        # What lut_linear would check holds by how all this was made, and to check it takes as long
        # as a small layer: 2 % of a step of SmolLM2.
        return backend.lut_linear(x, codes, entries, slots, None)
