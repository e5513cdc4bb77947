"""Weighted one-dimensional Lloyd: the values of a table, given the weights they will stand for.

SpaLLM section 2.2, "weighted Lloyd's algorithm for learning sketched parameters". In one dimension
clusters are intervals, so each row is sorted once and every iteration is a binary search of the
midpoints in it; prefix sums then give all the means. No [rows, columns, clusters] tensor is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ITERATIONS = 50
# Prefix sums take 24 bytes a weight in float64; rows are independent, so they go in chunks.
_CHUNK_ELEMENTS = 1 << 20


def lloyd_tables(values: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Minimise ``sum_j weights[j] * (values[r, j] - table[r, assigned(r, j)])**2`` in every row.

    Two starts are tried, evenly spaced values and evenly spaced quantiles, and each row keeps the
    better one. An empty cluster keeps its value.

    Args:
        values: float32 ``[rows, columns]``.
        weights: float32 ``[columns]``, not negative, shared by the rows.
        clusters: entries in a table.

    Returns:
        float32 ``[rows, clusters]``, ascending in each row.
    """
    rows, columns = values.shape
    chunk = max(1, _CHUNK_ELEMENTS // max(columns, 1))
    parts = [
        _lloyd_rows(values[start : start + chunk], weights, clusters)
        for start in range(0, rows, chunk)
    ]
    return torch.cat(parts) if parts else values.new_zeros(0, clusters)


def _lloyd_rows(values: Tensor, weights: Tensor, clusters: int) -> Tensor:
    ordered, order = values.sort(dim=1)
    mass = _prefix_sums(weights.double()[order])
    moment = _prefix_sums(weights.double()[order] * ordered)

    spacing = torch.linspace(0, 1, clusters, device=values.device, dtype=values.dtype)
    low, high = ordered[:, :1], ordered[:, -1:]
    quantile = ((torch.arange(clusters, device=values.device) + 0.5) / clusters).mul(
        values.shape[1]
    )
    starts = (low + (high - low) * spacing, ordered[:, quantile.long()])

    best: Tensor | None = None
    for start in starts:
        centers = _iterate(ordered, mass, moment, start.contiguous())
        if best is None:
            best, best_gain = centers, _explained(ordered, mass, moment, centers)
            continue
        gain = _explained(ordered, mass, moment, centers)
        best = torch.where((gain > best_gain).unsqueeze(1), centers, best)
    assert best is not None
    return best


def _iterate(ordered: Tensor, mass: Tensor, moment: Tensor, centers: Tensor) -> Tensor:
    for _ in range(MAX_ITERATIONS):
        cluster_mass, cluster_moment = _cluster_sums(ordered, mass, moment, centers)
        means = (cluster_moment / cluster_mass).to(centers.dtype)
        updated = torch.where(cluster_mass > 0, means, centers).sort(dim=1).values
        if torch.equal(updated, centers):
            break
        centers = updated
    return centers


def _cluster_sums(
    ordered: Tensor, mass: Tensor, moment: Tensor, centers: Tensor
) -> tuple[Tensor, Tensor]:
    """Total weight and weighted sum of each center's interval, float64 ``[rows, clusters]``."""
    midpoints = (centers[:, 1:] + centers[:, :-1]) / 2
    inner = torch.searchsorted(ordered, midpoints)
    first = torch.zeros_like(inner[:, :1])
    edges = torch.cat([first, inner, first + ordered.shape[1]], dim=1)
    return mass.gather(1, edges).diff(dim=1), moment.gather(1, edges).diff(dim=1)


def _explained(ordered: Tensor, mass: Tensor, moment: Tensor, centers: Tensor) -> Tensor:
    """What the centers take off the weighted sum of squares, per row: larger is better."""
    cluster_mass, cluster_moment = _cluster_sums(ordered, mass, moment, centers)
    return (2 * centers * cluster_moment - centers.double() ** 2 * cluster_mass).sum(dim=1)


def _prefix_sums(terms: Tensor) -> Tensor:
    zero = torch.zeros_like(terms[:, :1])
    return torch.cat([zero, terms.cumsum(dim=1)], dim=1)
