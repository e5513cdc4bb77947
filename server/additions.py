"""What an adapter adds to the outputs of a linear: the product with a LoRA, or with blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from spallm_serve.trainer.smt.ops import BlockLayout, block_delta


class Addition(Protocol):
    """Takes the outputs ``[tokens, rows]`` and the inputs ``[tokens, in]`` of its own tokens."""

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` with what is added."""

    def to(self, device: torch.device) -> Addition:
        """The same on a device; itself if it is there."""

    @property
    def nbytes(self) -> int:
        """What it takes."""


@dataclass(frozen=True)
class LoraAddition:
    """``y + (x down) up``.

    Attributes:
        down: ``[in, rank]``.
        up: ``[rank, rows]``, scaled.
    """

    down: Tensor
    up: Tensor

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """See :class:`Addition`."""
        return torch.addmm(y, x @ self.down, self.up)

    def to(self, device: torch.device) -> LoraAddition:
        """See :class:`Addition`."""
        return replace(self, down=self.down.to(device), up=self.up.to(device))

    @property
    def nbytes(self) -> int:
        """See :class:`Addition`."""
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True)
class BlockAddition:
    """``y + x S^T`` for a weight S that is zero but for some blocks (SMT).

    Attributes:
        blocks: ``[m, size, size]``.
        index: int32 ``[m, 2]``, row and column of each in units of ``size``.
        size: of the blocks.
    """

    blocks: Tensor
    index: Tensor
    size: int

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """See :class:`Addition`."""
        return block_delta(y, x, self.blocks, self._layout)

    def to(self, device: torch.device) -> BlockAddition:
        """See :class:`Addition`."""
        return replace(self, blocks=self.blocks.to(device), index=self.index.to(device))

    @property
    def nbytes(self) -> int:
        """See :class:`Addition`."""
        return self.blocks.nbytes + self.index.nbytes

    @cached_property
    def _layout(self) -> BlockLayout:
        return BlockLayout.of(self.index, self.size)
