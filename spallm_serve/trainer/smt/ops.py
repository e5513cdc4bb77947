"""Products with a few blocks of a weight, and their gradient: only what the blocks need is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class _Group:
    """The blocks of one strip of rows, or of one strip of columns.

    Attributes:
        strip: the strip's place, in units of the block size.
        blocks: int64 ``[k]``, the blocks' numbers.
        partners: int64 ``[k]``, for each block its strip on the other side.
        run: the first partner, if each of the others is the next one; else None.
    """

    strip: int
    blocks: Tensor
    partners: Tensor
    run: int | None

    def joined(self, strips: Tensor) -> Tensor:
        """The partners of ``[tokens, strips, size]`` side by side: ``[tokens, k * size]``."""
        if self.run is not None:  # no copy is needed
            return strips[:, self.run : self.run + len(self.partners)].flatten(1)
        return strips.index_select(1, self.partners).flatten(1)


@dataclass(frozen=True)
class BlockLayout:
    """Where the blocks of one weight lie, arranged for few and large products.

    Blocks of one strip of rows add to the same outputs: one product of their inputs side by side.
    Those of one strip of columns share their inputs: one product gives all their gradients.

    Attributes:
        size: l, the height and width of a block.
        columns: int64 ``[c]``, the distinct strips of columns, ascending.
        by_row: groups whose partners are places in ``columns``.
        by_column: groups in the order of ``columns`` whose partners are strips of rows.
    """

    size: int
    columns: Tensor
    by_row: tuple[_Group, ...]
    by_column: tuple[_Group, ...]

    @classmethod
    def of(cls, block_index: Tensor, size: int) -> BlockLayout:
        """Arrange blocks.

        Args:
            block_index: integer ``[m, 2]``, row and column of each block in units of ``size``.
            size: of the blocks.
        """
        rows, columns = block_index.T.tolist()
        distinct = sorted(set(columns))
        place = {column: position for position, column in enumerate(distinct)}
        device = block_index.device
        return cls(
            size,
            torch.tensor(distinct, device=device),
            _groups(rows, [place[column] for column in columns], device),
            _groups(columns, rows, device),
        )


def _groups(
    strips: Sequence[int], partners: Sequence[int], device: torch.device
) -> tuple[_Group, ...]:
    members: dict[int, list[int]] = {}
    for number in sorted(range(len(strips)), key=lambda number: (strips[number], partners[number])):
        members.setdefault(strips[number], []).append(number)
    groups = []
    for strip, numbers in members.items():
        theirs = [partners[number] for number in numbers]
        consecutive = theirs == list(range(theirs[0], theirs[0] + len(theirs)))
        groups.append(
            _Group(
                strip,
                torch.tensor(numbers, device=device),
                torch.tensor(theirs, device=device),
                theirs[0] if consecutive else None,
            )
        )
    return tuple(groups)


def block_delta(y: Tensor, x: Tensor, blocks: Tensor, layout: BlockLayout) -> Tensor:
    """Add what the chosen blocks contribute to a linear layer's output.

    ``out[:, i l:(i+1) l] = y[:, i l:(i+1) l] + sum over blocks b at (i, j) of
    x[:, j l:(j+1) l] S_b^T`` (SMT, section "Proposed Method"; forward of a weight W + S). At a
    ragged edge, entries of a block beyond the weight take no part, and their gradient is zero.

    Differentiable in ``y``, ``x`` and ``blocks``: ``dS_b = dY_i^T X_j``, summed in float32, and
    ``dx_j += dY_i S_b``. For the former a copy of the distinct columns of x that the blocks read
    is kept, in the dtype of y; x itself is not.

    Args:
        y: ``[..., out]``, the frozen layer's output; its dtype is the one that is computed in.
        x: ``[..., in]``, its input.
        blocks: ``[m, l, l]``, usually float32, each ``[rows, columns]``.
        layout: where the blocks lie.

    Returns:
        ``[..., out]`` in the dtype of ``y``; ``y`` is left as it is.
    """
    result: Tensor = _BlockDelta.apply(y, x, blocks, layout)
    return result


class _BlockDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, blocks: Tensor, layout: BlockLayout) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        count = layout.by_column[-1].strip + 1
        kept = _strips(flat, layout.size, count).index_select(1, layout.columns).to(y.dtype)
        # Not in place: y is often a view, whose gradient autograd would then copy.
        out = y.clone(memory_format=torch.contiguous_format)
        _add_products(out.view(-1, out.shape[-1]), kept, blocks.to(y.dtype), layout)
        ctx.save_for_backward(kept if ctx.needs_input_grad[2] else None, blocks)
        ctx.layout, ctx.x_shape = layout, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        kept, blocks = ctx.saved_tensors
        _, wants_x, wants_blocks, _ = ctx.needs_input_grad
        layout: BlockLayout = ctx.layout
        flat = dy.reshape(-1, dy.shape[-1])
        strips = _strips(flat, layout.size, layout.by_row[-1].strip + 1)
        dblocks = _block_gradient(strips, kept, layout) if wants_blocks else None
        dx = None
        if wants_x:
            dx = _input_gradient(strips, blocks.to(dy.dtype), layout, ctx.x_shape[-1])
            dx = dx.view(ctx.x_shape)
        return dy, dx, dblocks, None  # autograd casts each to its input's dtype


def _strips(matrix: Tensor, size: int, count: int) -> Tensor:
    """The first strips of columns, ``[tokens, count, size]``; zeros beyond a ragged edge."""
    missing = count * size - matrix.shape[1]
    padded = F.pad(matrix, (0, missing)) if missing > 0 else matrix[:, : count * size]
    return padded.unflatten(1, (count, size))


# Products below are written into slices (`out=`): nothing is made twice.


def _add_products(out: Tensor, kept: Tensor, blocks: Tensor, layout: BlockLayout) -> None:
    for group in layout.by_row:
        start = group.strip * layout.size
        rows = out[:, start : start + layout.size]
        side_by_side = blocks.index_select(0, group.blocks).transpose(0, 1).flatten(1)
        weight = side_by_side[: rows.shape[1]]
        torch.addmm(rows, group.joined(kept), weight.T, out=rows)


def _block_gradient(dy_strips: Tensor, kept: Tensor, layout: BlockLayout) -> Tensor:
    size = layout.size
    count = sum(len(group.blocks) for group in layout.by_column)
    # A sum over many tokens needs more digits than bfloat16 has.
    dtype = torch.promote_types(kept.dtype, torch.float32)
    gradient = kept.new_empty(count, size, size, dtype=dtype)
    for position, group in enumerate(layout.by_column):
        theirs = group.joined(dy_strips).to(dtype).T @ kept[:, position].to(dtype)
        gradient.index_copy_(0, group.blocks, theirs.view(-1, size, size))
    return gradient


def _input_gradient(dy_strips: Tensor, blocks: Tensor, layout: BlockLayout, columns: int) -> Tensor:
    dx = dy_strips.new_zeros(len(dy_strips), columns)
    for group in layout.by_column:
        start = group.strip * layout.size
        theirs = dx[:, start : start + layout.size]
        weight = blocks.index_select(0, group.blocks).flatten(0, 1)[:, : theirs.shape[1]]
        torch.mm(group.joined(dy_strips), weight, out=theirs)
    return dx
