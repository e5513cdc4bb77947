"""A compressed layer with a set of tables for each slot, and what adapters add to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from spallm_serve.kernels import prepare_codes
from spallm_serve.kernels.backend import Backend
from spallm_serve.kernels.choice import backend_of, keeps_bfloat16
from spallm_serve.kernels.cpu.dense import dense_linear
from spallm_serve.kernels.held_tables import HeldTables
from spallm_serve.server.additions import Addition


@dataclass
class StepSlots:
    """Which slot each token of the current step uses; slot 0 is the base.

    Attributes:
        slots: int32 ``[tokens]``, or None where all tokens use the same slot.
        only: that slot.
        places: of each slot but the base's that has tokens, the tokens.
        device: of the layers.
    """

    slots: Tensor | None = None
    only: int = 0
    places: Mapping[int, list[int]] = field(default_factory=dict)
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, slots: Sequence[int], device: torch.device | str = "cpu") -> StepSlots:
        """Of the slot of each token."""
        places: dict[int, list[int]] = {}
        for token, slot in enumerate(slots):
            places.setdefault(slot, []).append(token)
        present = list(places)
        places.pop(0, None)
        if len(present) <= 1:
            return cls(None, present[0] if present else 0, places, device)
        tensor = torch.tensor(slots, dtype=torch.int32, device=device)
        return cls(tensor, 0, places, device)

    @cached_property
    def runs(self) -> tuple[tuple[int, Tensor], ...]:
        """The places as int64; made when an adapter first asks that is more than tables."""
        return tuple(
            (slot, torch.tensor(tokens, device=self.device)) for slot, tokens in self.places.items()
        )

    def first(self, tokens: int) -> Tensor | None:
        """The slots of a batch that may have been padded; padding uses the base."""
        if self.slots is None or len(self.slots) == tokens:
            return self.slots
        padded = self.slots.new_zeros(tokens)
        padded[: len(self.slots)] = self.slots
        return padded


@dataclass(frozen=True)
class Sketched:
    """A linear as a checkpoint has it, or its share of one.

    Attributes:
        planes: uint8 ``[bits, out, ceil(in / 8)]``.
        tables: float16 ``[out, groups, 2**bits]``.
        columns: in.
    """

    planes: Tensor
    tables: Tensor
    columns: int

    @property
    def rows(self) -> int:
        """out."""
        return len(self.tables)


@dataclass(frozen=True)
class Dense:
    """A linear that was left as it is, or its share of one: ``weight [out, in]``."""

    weight: Tensor

    @property
    def rows(self) -> int:
        """out."""
        return len(self.weight)


Linear = Sketched | Dense


@dataclass
class _DenseSegment:
    """Linears that were left as they are: the same for all slots."""

    weight: Tensor

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def slot_bytes(self) -> int:
        return 0

    def product(self, x: Tensor, slots: Tensor | None, only: int) -> Tensor:
        kept = self.weight.dtype != x.dtype
        return dense_linear(x, self.weight) if kept else F.linear(x, self.weight)


@dataclass
class _SketchedSegment:
    """Linears of one format, their rows one below the other.

    The codes are held once: as bit-planes until the first product, then as its kernel reads them.
    """

    codes: Tensor
    columns: int
    tables: HeldTables
    prepared_for: torch.dtype | None = None
    backend: Backend | None = None

    @property
    def device(self) -> torch.device:
        return self.tables.entries.device

    @property
    def slot_bytes(self) -> int:
        return self.tables.slot_bytes

    def product(self, x: Tensor, slots: Tensor | None, only: int) -> Tensor:
        self._prepare(x.dtype)
        assert self.backend is not None
        return self.tables.linear(x, self.codes, self.backend, slots, only)

    def _prepare(self, dtype: torch.dtype) -> None:
        if dtype != self.prepared_for:
            # What inference mode makes could not take part in anything else later.
            with torch.inference_mode(False):
                if self.prepared_for is not None:
                    self.codes = backend_of(self.codes).planes(self.codes)
                groups = self.tables.entries.shape[2]
                self.codes = prepare_codes(self.codes, self.columns, groups, dtype)
            self.prepared_for, self.backend = dtype, backend_of(self.codes)


@dataclass(frozen=True)
class Part:
    """One linear of a merged layer.

    Attributes:
        segment: which one holds it.
        start: its first row there.
        offset: its first row in the layer's output.
        rows: how many it has.
    """

    segment: int
    start: int
    offset: int
    rows: int


@dataclass
class SlottedLinear:
    """Linears that read one input, merged into one layer: q, k and v, or gate and up, or one alone.

    Their codes are held once. Linears of one format are multiplied together, whatever tables each
    token uses; those that were left as they are have no tables and are the same for all.

    Attributes:
        parts: the linears in the order of their outputs.
    """

    parts: list[Part]
    _segments: list[_SketchedSegment | _DenseSegment]
    _added: dict[int, list[tuple[Part, Addition]]] = field(default_factory=dict)

    @classmethod
    def of(cls, linears: Sequence[Linear], slots: int, dtype: torch.dtype) -> SlottedLinear:
        """Merge linears.

        Args:
            linears: all with the same ``columns``.
            slots: sets of tables, the base's included; all are the base's to begin with.
            dtype: of the activations.
        """
        parts: list[Part] = []
        members: list[list[Linear]] = []
        formats: list[tuple[int, ...]] = []
        offset = 0
        for linear in linears:
            # Neighbours only: the outputs of a segment lie side by side.
            shape = () if isinstance(linear, Dense) else tuple(linear.tables.shape[1:])
            if not formats or formats[-1] != shape:
                formats.append(shape)
                members.append([])
            start = sum(other.rows for other in members[-1])
            members[-1].append(linear)
            parts.append(Part(len(members) - 1, start, offset, linear.rows))
            offset += linear.rows
        return cls(parts, [_segment(each, slots, dtype) for each in members])

    def __call__(self, x: Tensor, bias: Tensor | None, step: StepSlots) -> Tensor:
        """``x [..., in] -> [..., out]``, each token by the tables of its slot."""
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        flat = flat.contiguous()
        slots = step.first(len(flat))
        outputs = [segment.product(flat, slots, step.only) for segment in self._segments]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if bias is not None:
            y = y + bias
        self._add(y, flat, step)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @property
    def rows(self) -> int:
        """out, of all linears together."""
        return self.parts[-1].offset + self.parts[-1].rows

    @property
    def device(self) -> torch.device:
        """Where its codes and weights are."""
        return self._segments[0].device

    def base_tables(self, part: Part) -> HeldTables:
        """The base's tables of a linear."""
        return self._tables(0, part)

    def fill(
        self,
        slot: int,
        tables: Mapping[int, HeldTables],
        additions: Mapping[int, Addition],
    ) -> None:
        """Put an adapter into a slot that no token uses.

        Args:
            slot: not 0.
            tables: by the number of the linear, in the form of the base's; those that are not there
                are the base's.
            additions: by the number of the linear.
        """
        for number, part in enumerate(self.parts):
            if isinstance(self._segments[part.segment], _DenseSegment):
                continue
            own = tables.get(number)
            self._tables(slot, part).copy_(self.base_tables(part) if own is None else own)
        self._added.pop(slot, None)
        if additions:
            self._added[slot] = [
                (self.parts[number], add.to(self.device)) for number, add in additions.items()
            ]

    @property
    def slot_bytes(self) -> int:
        """What the tables of one slot take."""
        return sum(segment.slot_bytes for segment in self._segments)

    def _tables(self, slot: int, part: Part) -> HeldTables:
        segment = self._segments[part.segment]
        assert isinstance(segment, _SketchedSegment)
        return segment.tables.rows(slot, part.start, part.start + part.rows)

    def _add(self, y: Tensor, x: Tensor, step: StepSlots) -> None:
        if not self._added:
            return
        for slot, tokens in step.runs:
            for part, add in self._added.get(slot, ()):
                columns = slice(part.offset, part.offset + part.rows)
                y[tokens, columns] = add(y[tokens, columns], x[tokens])


def _segment(
    linears: Sequence[Linear], slots: int, dtype: torch.dtype
) -> _SketchedSegment | _DenseSegment:
    """Of linears that are all sketches of one format, or all left as they are."""
    weights = [linear.weight for linear in linears if isinstance(linear, Dense)]
    if weights:
        weight = torch.cat(weights)
        kept = keeps_bfloat16(weight.device.type, dtype, weight.dtype)
        return _DenseSegment(weight if kept else weight.to(dtype))
    sketches = [linear for linear in linears if isinstance(linear, Sketched)]
    planes = torch.cat([linear.planes for linear in sketches], dim=1)
    tables = HeldTables.of(torch.cat([linear.tables for linear in sketches]), slots, dtype)
    return _SketchedSegment(planes, sketches[0].columns, tables)
