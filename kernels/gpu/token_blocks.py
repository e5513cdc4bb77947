"""Tokens sorted by slot into blocks of one slot each, on the device and without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBlocks:
    """Which tokens each block of a grid works on; all shapes depend on shapes alone.

    Attributes:
        order: int32 ``[tokens]``, tokens sorted by slot.
        slot: int32 ``[blocks]``; ``n_slots`` for tokens whose slot has no tables.
        start, stop: int32 ``[blocks]``, the block's part of ``order``; empty for spare blocks.
    """

    order: Tensor
    slot: Tensor
    start: Tensor
    stop: Tensor


def token_blocks(slots: Tensor, n_slots: int, block_tokens: int) -> TokenBlocks:
    """Sort tokens by slot and cut them into blocks of at most ``block_tokens``.

    Args:
        slots: int32 ``[tokens]``; those without tables go together as slot ``n_slots``.
        n_slots: slots with tables.
        block_tokens: of one block.
    """
    tokens = len(slots)
    known = torch.where((slots >= 0) & (slots < n_slots), slots, n_slots).long()
    counts = torch.zeros(n_slots + 1, dtype=torch.long, device=slots.device)
    counts.scatter_add_(0, known, torch.ones_like(known))
    blocks_of = (counts + block_tokens - 1) // block_tokens
    last_block, last_token = blocks_of.cumsum(0), counts.cumsum(0)
    # No slot leaves more than one block that is not full.
    most = min(tokens, tokens // block_tokens + n_slots + 1)
    block = torch.arange(most, device=slots.device)
    slot = torch.searchsorted(last_block, block, right=True).clamp(max=n_slots)
    first = last_token[slot] - counts[slot]
    start = first + (block - (last_block[slot] - blocks_of[slot])) * block_tokens
    stop = torch.minimum(start + block_tokens, last_token[slot])
    order = known.argsort(stable=True)
    return TokenBlocks(order.int(), slot.int(), start.int(), stop.int())
