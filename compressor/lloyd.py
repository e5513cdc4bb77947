"""Weighted one-dimensional Lloyd: the values of a table, given the weights they will stand for.

SpaLLM section 2.2, "weighted Lloyd's algorithm for learning sketched parameters". In one dimension
clusters are intervals, so each row is sorted once and every iteration is a binary search of the
midpoints in it; prefix sums then give all the means. No [rows, columns, clusters] tensor is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.compressor import native

MAX_ITERATIONS = 50
# So many tell which start is the best of a row; only that one is followed to its end.
_TRIAL_ITERATIONS = 16
_DENSITY_POINTS = 512
# Prefix sums take 24 bytes a weight in float64; rows are independent, so they go in chunks.
_CHUNK_ELEMENTS = 1 << 20


def lloyd_tables(values: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Minimise ``sum_j weights[j] * (values[r, j] - table[r, assigned(r, j)])**2`` in every row.

    Three starts are tried, evenly spaced values, evenly spaced quantiles and values as dense as the
    best points should be, and each row goes on with the one that is best after some iterations. An
    empty cluster keeps its value.

    Args:
        values: float32 ``[rows, columns]``.
        weights: float32 ``[columns]``, not negative, shared by the rows.
        clusters: entries in a table.

    Returns:
        float32 ``[rows, clusters]``, ascending in each row.
    """
    rows, columns = values.shape
    if native.usable_for(values) and columns:
        return native.lloyd(
            values.contiguous(),
            weights.contiguous(),
            clusters,
            _TRIAL_ITERATIONS,
            MAX_ITERATIONS,
            _DENSITY_POINTS,
        )
    chunk = max(1, _CHUNK_ELEMENTS // max(columns, 1))
    parts = [
        _lloyd_rows(values[start : start + chunk], weights, clusters)
        for start in range(0, rows, chunk)
    ]
    return torch.cat(parts) if parts else values.new_zeros(0, clusters)


def _lloyd_rows(values: Tensor, weights: Tensor, clusters: int) -> Tensor:
    ordered, order = values.sort(dim=1)
    sorted_weights = weights.double()[order]
    mass = _prefix_sums(sorted_weights)
    moment = _prefix_sums(sorted_weights * ordered)

    starts = (
        _evenly_spaced(ordered, clusters),
        _quantiles(ordered, clusters),
        _companded(ordered, sorted_weights, clusters),
    )
    tried = torch.stack(
        [_iterate(ordered, mass, moment, start, _TRIAL_ITERATIONS) for start in starts]
    )
    gains = torch.stack([_explained(ordered, mass, moment, centers) for centers in tried])
    best = tried.gather(0, gains.argmax(0)[None, :, None].expand(1, -1, clusters)).squeeze(0)
    return _iterate(ordered, mass, moment, best, MAX_ITERATIONS)


def _evenly_spaced(ordered: Tensor, clusters: int) -> Tensor:
    low, high = ordered[:, :1], ordered[:, -1:]
    spacing = torch.linspace(0, 1, clusters, device=ordered.device, dtype=ordered.dtype)
    return low + (high - low) * spacing


def _quantiles(ordered: Tensor, clusters: int) -> Tensor:
    position = (torch.arange(clusters, device=ordered.device) + 0.5) / clusters * ordered.shape[1]
    return ordered[:, position.long()]


def _companded(ordered: Tensor, sorted_weights: Tensor, clusters: int) -> Tensor:
    """Values of the row, as dense as the best points of many are: like the cube root of weight
    times density (Panter and Dite 1951). A gap between neighbours is one over their density; some
    hundred neighbours tell enough."""
    stride = max(1, ordered.shape[1] // _DENSITY_POINTS)
    ordered, weights = ordered[:, ::stride], sorted_weights[:, ::stride]
    between = (weights[:, 1:] + weights[:, :-1]) / 2
    spread = _prefix_sums(ordered.double().diff(dim=1).pow(2 / 3) * between.pow(1 / 3))
    middle = (torch.arange(clusters, device=ordered.device) + 0.5) / clusters
    position = torch.searchsorted(spread, middle * spread[:, -1:])
    return ordered.gather(1, position.clamp(max=ordered.shape[1] - 1))


def _iterate(
    ordered: Tensor, mass: Tensor, moment: Tensor, centers: Tensor, iterations: int
) -> Tensor:
    for _ in range(iterations):
        cluster_mass, cluster_moment = _cluster_sums(ordered, mass, moment, centers)
        means = (cluster_moment / cluster_mass).to(centers.dtype)
        # A cluster with next to no weight may lose its mean to cancellation.
        means = means.clamp(ordered[:, :1], ordered[:, -1:])
        updated = torch.where(cluster_mass > 0, means, centers)
        if torch.equal(updated, centers):
            break
        centers = updated
    # Means of intervals in order are in order; only rounding could have swapped two.
    return centers.sort(dim=1).values


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
    zero = terms.new_zeros(terms.shape[0], 1)
    return torch.cat([zero, terms.cumsum(dim=1)], dim=1)
