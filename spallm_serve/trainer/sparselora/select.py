"""Which channels matter to the context tokens, guessed from low-rank factors of the weights.

SparseLoRA, sections 3.1 (criteria) and 3.2 (estimator). Nothing here needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Low-rank factors of a linear layer: ``x a b`` estimates ``x W^T``.

    Attributes:
        a: ``[in, rank]``.
        b: ``[rank, out]``.
    """

    a: Tensor
    b: Tensor

    def estimate(self, x: Tensor) -> Tensor:
        """``x [tokens, in] -> [tokens, out]``, float32."""
        return x.float() @ self.a.float() @ self.b.float()


def kept_count(channels: int, sparsity: float) -> int:
    """How many of the channels are kept: ``int(channels (1 - sparsity))``, at least one."""
    # 100 channels less 90 % are 9.999999999999998 in floating point.
    return max(1, int(channels * (1 - sparsity) + 1e-6))


def kept_pairs(channels: int, sparsity: float) -> int:
    """How many rotary pairs are kept of ``channels`` channels, at least one."""
    return max(1, kept_count(channels, sparsity) // 2)


def strongest(scores: Tensor, count: int) -> Tensor:
    """The places of the ``count`` highest scores, int64, ascending."""
    return scores.topk(count, sorted=False).indices.sort().values


def mlp_scores(
    x: Tensor,
    gate: Factors,
    up: Factors,
    activation: Callable[[Tensor], Tensor],
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """L2 norm over tokens of what enters the down projection (section 3.1.1).

    Args:
        x: ``[tokens, in]``.
        gate, up: factors of the two projections.
        activation: the MLP's.
        gate_bias, up_bias: ``[channels]``, where the projections have one.

    Returns:
        float32 ``[channels]``.
    """
    x = x.float()
    gated, raised = gate.estimate(x), up.estimate(x)
    if gate_bias is not None:
        gated += gate_bias
    if up_bias is not None:
        raised += up_bias
    return _norms_in_place(activation(gated).mul_(raised))


def value_scores(x: Tensor, value: Factors) -> Tensor:
    """L2 norm over tokens of the values: float32 ``[kv channels]`` (section 3.1.1)."""
    return _norms_in_place(value.estimate(x))


def query_key_scores(x: Tensor, query: Factors, key: Factors, head: int) -> Tensor:
    """What each rotary pair contributes to the attention scores (section 3.1.2).

    The product of the pair's norm over tokens in the query and in the key. A pair, channels c and
    c + head / 2 of a head, is judged as one since RoPE rotates it within itself, which leaves its
    norm as it is: the score before RoPE is the one after it. All query heads that share a key head
    count (their norms' L2 norm).

    Args:
        x: ``[tokens, in]``.
        query, key: factors of the projections to ``groups * kv heads * head`` and ``kv heads *
            head`` channels.
        head: channels of a head; even.

    Returns:
        float32 ``[kv heads * head / 2]``.
    """
    x = x.float()
    queries, keys = query.estimate(x).square_().sum(0), key.estimate(x).square_().sum(0)
    kv_heads = len(keys) // head
    # [kv head, query head that shares it, half, pair]
    strength = queries.view(kv_heads, -1, 2, head // 2).sum((1, 2)).sqrt()
    return (strength * keys.view(kv_heads, 2, head // 2).sum(1).sqrt()).view(-1)


def pair_channels(pairs: Tensor, head: int) -> Tensor:
    """The channels of rotary pairs: pair p of head h is channels h head + p and that + head / 2.

    Args:
        pairs: int64, places in what :func:`query_key_scores` gives.
        head: channels of a head.

    Returns:
        int64, twice as many, ascending.
    """
    half = head // 2
    lower = pairs // half * head + pairs % half
    return torch.cat([lower, lower + half]).sort().values


def query_channels(channels: Tensor, head: int, groups: int) -> Tensor:
    """The query channels that meet key or value channels in the attention.

    Key head h serves the query heads ``h groups .. h groups + groups - 1``, so channel
    ``h head + c`` meets ``(h groups + g) head + c``.

    Args:
        channels: int64, of the keys or values.
        head: channels of a head.
        groups: query heads to a key head.

    Returns:
        int64, ``groups`` times as many, ascending.
    """
    first = channels // head * (groups * head) + channels % head
    steps = torch.arange(groups, device=channels.device) * head
    return (first[:, None] + steps).flatten().sort().values


def _norms_in_place(x: Tensor) -> Tensor:
    """L2 norm of each column; torch's own takes ten times as long on CPUs."""
    return x.square_().sum(0).sqrt()
