"""A frozen linear layer with trainable blocks on top of its weight."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from spallm_serve.errors import UserError
from spallm_serve.layers import weight_shape
from spallm_serve.trainer.smt.ops import BlockLayout, block_delta


def grid_shape(linear: nn.Module, size: int) -> tuple[int, int]:
    """Rows and columns of blocks that a linear layer's weight has, ragged ones counted."""
    rows, columns = weight_shape(linear)
    return -(-rows // size), -(-columns // size)


def check_block_index(block_index: Tensor, linear: nn.Module, size: int, where: str) -> None:
    """Refuse blocks that the weight does not have, or has once but are given twice.

    Raises:
        UserError: not int32 ``[m, 2]`` with m at least 1, out of range, or a duplicate; starts with
            ``where``.
    """
    if block_index.dtype != torch.int32 or block_index.dim() != 2 or block_index.shape[1] != 2:
        dtype = str(block_index.dtype).removeprefix("torch.")
        raise UserError(f"{where}: expected int32 [m, 2], got {dtype} {list(block_index.shape)}")
    if not len(block_index):
        raise UserError(f"{where}: holds no block")
    grid = grid_shape(linear, size)
    seen: set[tuple[int, int]] = set()
    for row, column in block_index.tolist():
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise UserError(
                f"{where}: block ({row}, {column}) is outside of {grid[0]} x {grid[1]} blocks; "
                "the adapter is for another model or damaged"
            )
        if (row, column) in seen:
            raise UserError(f"{where}: block ({row}, {column}) is given twice")
        seen.add((row, column))


class SmtLinear(nn.Module):
    """A linear layer whose weight has blocks added to it; in the layer's place.

    The blocks are float32 ``[m, l, l]``, zero to begin with, each ``[out, in]`` whatever way round
    the layer stores its weight. What lies beyond a ragged edge stays zero: its gradient is.

    Args:
        base: the layer; frozen.
        block_index: int32 ``[m, 2]``, see :func:`check_block_index`.
        block_size: l.
    """

    block_index: Tensor

    def __init__(self, base: nn.Module, block_index: Tensor, block_size: int) -> None:
        super().__init__()
        self.base, self.block_size = base, block_size
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        zeros = torch.zeros(len(block_index), block_size, block_size, device=device)
        self.blocks = nn.Parameter(zeros)
        self.register_buffer("block_index", block_index.to(device))
        self._layout: BlockLayout | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in the dtype of the base's output."""
        layout = self._layout
        if layout is None or layout.columns.device != self.block_index.device:
            layout = self._layout = BlockLayout.of(self.block_index, self.block_size)
        return block_delta(self.base(x), x, self.blocks, layout)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._layout = None  # the blocks may lie elsewhere now
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"blocks={len(self.blocks)}, block_size={self.block_size}"
