"""Which rows' tables are worth training: those with the largest gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def row_scores(gradient: Tensor) -> Tensor:
    """The length of each row's gradient.

    Args:
        gradient: of tables, ``[out, groups, 2**bits]``.

    Returns:
        float32 ``[out]``.
    """
    return gradient.float().flatten(1).norm(dim=1)


def top_rows(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The rows with the highest scores of all layers together.

    Of equal ones those of the earlier layer, in the mapping's order, and the earlier row.

    Args:
        scores: ``[out]`` of each layer.
        share: of all rows, above 0 and at most 1; at least one row is chosen.

    Returns:
        int32 ``[n]``, ascending, of each layer that has any.
    """
    every = torch.cat(list(scores.values()))
    count = max(1, math.floor(share * len(every)))
    # A stable sort, since topk may break ties as it likes.
    order = every.sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[order] = True
    parts = chosen.split([len(layer) for layer in scores.values()])
    rows = {name: part.nonzero()[:, 0].int() for name, part in zip(scores, parts, strict=True)}
    return {name: index for name, index in rows.items() if len(index)}
