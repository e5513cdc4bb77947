"""Bits for each layer from measured losses, to a byte budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

from spallm_serve.compressor.plan import PlannedLayer
from spallm_serve.errors import UserError
from spallm_serve.kernels.packing import SUPPORTED_BITS
from spallm_serve.sketch import sketch_nbytes


def allocate_bits(
    layers: Mapping[str, PlannedLayer],
    errors: Mapping[str, Mapping[int, float]],
    target_bits: float,
) -> dict[str, int]:
    """Spend a budget of ``target_bits`` per weight, tables counted, where it takes off most error.

    All layers start at the fewest bits; the upgrade with the largest fall of error per byte is
    bought until none fits. On each layer's convex hull of (bytes, error) this greedy order is
    optimal for the sum of errors up to the last upgrade (Shoham and Gersho 1988).

    Args:
        layers: what to compress; those with fixed bits count towards the budget and stay.
        errors: for each layer that is not fixed, the error measured at each number of bits.
        target_bits: average bits per weight of the compressed layers.

    Returns:
        bits for every layer.

    Raises:
        UserError: a budget below what the fewest bits take.
    """
    weights = sum(layer.weight_count for layer in layers.values())
    budget = int(target_bits * weights / 8)
    chosen = {
        name: layer.format.bits if layer.fixed else min(SUPPORTED_BITS)
        for name, layer in layers.items()
    }
    spent = sum(_nbytes(layers[name], bits) for name, bits in chosen.items())
    if spent > budget:
        raise UserError(
            f"--target-bits {target_bits:g} cannot be reached: with tables and fixed layers the "
            f"least is {math.ceil(8000 * spent / weights) / 1000:.3f} bits per weight"
        )
    queue: list[tuple[float, str, int]] = []
    for name, layer in layers.items():
        if not layer.fixed:
            _push_upgrade(queue, name, layer, errors[name], chosen[name])
    while queue:
        _, name, bits = heapq.heappop(queue)
        cost = _nbytes(layers[name], bits) - _nbytes(layers[name], chosen[name])
        if spent + cost > budget:
            _push_upgrade(queue, name, layers[name], errors[name], chosen[name], bits)
            continue
        spent += cost
        chosen[name] = bits
        _push_upgrade(queue, name, layers[name], errors[name], bits)
    return chosen


def _push_upgrade(
    queue: list[tuple[float, str, int]],
    name: str,
    layer: PlannedLayer,
    errors: Mapping[int, float],
    bits: int,
    below: int = max(SUPPORTED_BITS) + 1,
) -> None:
    """Queue the layer's steepest upgrade from ``bits`` to less than ``below``, if one lowers the
    error: the next corner of its convex hull."""
    slopes = [
        ((errors[more] - errors[bits]) / (_nbytes(layer, more) - _nbytes(layer, bits)), more)
        for more in SUPPORTED_BITS
        if bits < more < below and errors[more] < errors[bits]
    ]
    if slopes:
        slope, more = min(slopes)
        heapq.heappush(queue, (slope, name, more))


def _nbytes(layer: PlannedLayer, bits: int) -> int:
    return sketch_nbytes(layer.rows, layer.columns, bits, layer.format.groups_per_row)
