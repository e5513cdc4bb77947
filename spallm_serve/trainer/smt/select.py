"""Which blocks have the largest gradients: scores, strip by strip, and the choice by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def block_scores(dy: Tensor, x: Tensor, size: int) -> Tensor:
    """The mean magnitude of a weight's gradient in each of its blocks.

    ``score[i, j] = mean of |G| over block (i, j)`` of ``G = dY^T X``: SMT's gradient-aware
    selection ("average absolute gradient"). At a ragged edge the mean is over the entries there
    are. Of G only a strip of ``size`` rows is ever held.

    Args:
        dy: ``[tokens, out]``, the gradient of a linear layer's output.
        x: ``[tokens, in]``, its input.
        size: l, height and width of a block.

    Returns:
        float32 ``[ceil(out / l), ceil(in / l)]``.
    """
    inputs = x.float()
    columns = inputs.shape[1]
    widths = (columns - torch.arange(0, columns, size, device=x.device)).clamp(max=size)
    scores = []
    for rows in dy.split(size, dim=1):
        strip = (rows.T.float() @ inputs).abs_()
        sums = F.pad(strip, (0, -columns % size)).unflatten(1, (-1, size)).sum((0, 2))
        scores.append(sums / (widths * rows.shape[1]))
    return torch.stack(scores)


def blocks_in_share(parameters: int, share: float, size: int) -> int:
    """How many whole blocks a share of some parameters pays for; at least one."""
    return max(1, int(parameters * share) // size**2)


def select_blocks(
    scores: Mapping[str, Tensor], count: int, kinds: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The blocks with the largest scores.

    Of equal scores the first wins: in the order of the modules, then by row, then by column.

    Args:
        scores: module name -> floating point ``[rows, columns]``, a score for each block.
        count: of blocks to choose; at most as many as there are.
        kinds: module name -> kind, to give each kind an equal quota; None lets all compete. What a
            kind has too few blocks for is shared among the others; where blocks do not divide
            evenly, the kinds with the most get one more, of equal kinds the first.

    Returns:
        Module name -> int32 ``[m, 2]``, row and column of its blocks in that order; modules without
        any are left out.
    """
    if kinds is None:
        return _largest(scores, count)
    members: dict[str, dict[str, Tensor]] = {}
    for name, score in scores.items():
        members.setdefault(kinds[name], {})[name] = score
    sizes = [sum(score.numel() for score in theirs.values()) for theirs in members.values()]
    chosen: dict[str, Tensor] = {}
    for theirs, quota in zip(members.values(), _quotas(sizes, count), strict=True):
        chosen |= _largest(theirs, quota)
    return {name: chosen[name] for name in scores if name in chosen}


def _quotas(sizes: Sequence[int], count: int) -> list[int]:
    """Equal parts of a count, none above its size; the smallest settle first."""
    quotas = [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda kind: (sizes[kind], -kind))
    for done, kind in enumerate(order):
        quotas[kind] = min(sizes[kind], (count - sum(quotas)) // (len(sizes) - done))
    return quotas


def _largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    if not count:
        return {}
    flat = torch.cat([score.flatten() for score in scores.values()])
    best = flat.sort(descending=True, stable=True).indices[:count].sort().values
    chosen: dict[str, Tensor] = {}
    start = 0
    for name, score in scores.items():
        own = best[(best >= start) & (best < start + score.numel())] - start
        if len(own):
            width = score.shape[1]
            chosen[name] = torch.stack([own // width, own % width], 1).int()
        start += score.numel()
    return chosen
