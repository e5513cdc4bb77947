"""The few differentiable steps that sparse layers are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spallm_serve.trainer.sparselora.tokens import TokenSplit


def split_tokens(x: Tensor, split: TokenSplit) -> tuple[Tensor, Tensor]:
    """Part tokens into context and rest.

    Args:
        x: ``[tokens, width]``.
        split: of these tokens.

    Returns:
        ``[context, width]`` and ``[rest, width]``, each in the order of the tokens.

    Raises:
        ValueError: as many tokens as the split is not for.
    """
    if len(x) != len(split.order):
        raise ValueError(f"x: expected the {len(split.order)} tokens of the batch, got {len(x)}")
    context, rest = _Split.apply(x, split)
    return context, rest


def join_tokens(context: Tensor, rest: Tensor, split: TokenSplit) -> Tensor:
    """Inverse of :func:`split_tokens`: ``[tokens, width]``."""
    joined: Tensor = _Join.apply(context, rest, split)
    return joined


def frozen_product(x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
    """``x @ weight(dtype)``, differentiable in x.

    The weight is a slice that is made for the product, and once more for its gradient: kept, the
    slices of all layers would come to a good part of the model.

    Args:
        x: ``[tokens, in]``.
        weight: gives ``[in, out]`` in a dtype, the same whenever it is asked.
    """
    y: Tensor = _FrozenProduct.apply(x, weight)
    return y


def place_channels(x: Tensor, channels: Tensor, width: int) -> Tensor:
    """Put columns where they belong among zeros: ``[tokens, len(channels)] -> [tokens, width]``."""
    placed = x.new_zeros(len(x), width)
    return placed.scatter_(1, channels.expand(len(x), -1), x)


def take_channels(x: Tensor, channels: Tensor) -> Tensor:
    """Some columns: ``[tokens, width] -> [tokens, len(channels)]``."""
    # index_select along rows takes three times as long in bfloat16.
    return x.gather(1, channels.expand(len(x), -1))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: TokenSplit) -> tuple[Tensor, ...]:
        ctx.split = split
        count = split.context
        order = split.order
        return x.index_select(0, order[:count]), x.index_select(0, order[count:])

    @staticmethod
    def backward(ctx: Any, context: Tensor, rest: Tensor) -> tuple[Tensor, None]:
        return torch.cat([context, rest]).index_select(0, ctx.split.inverse), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Tensor, rest: Tensor, split: TokenSplit) -> Tensor:
        ctx.split = split
        return torch.cat([context, rest]).index_select(0, split.inverse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        count, order = ctx.split.context, ctx.split.order
        return dy.index_select(0, order[:count]), dy.index_select(0, order[count:]), None


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.weight = weight
        return x @ weight(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.weight(dy.dtype).T, None
