"""Allocation of bits against brute force over every combination."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spallm_serve.checkpoint import LayerFormat
from spallm_serve.compressor.allocation import allocate_bits
from spallm_serve.compressor.plan import PlannedLayer
from spallm_serve.errors import UserError
from spallm_serve.sketch import sketch_nbytes

Errors = dict[str, dict[int, float]]


def layer(
    rows: int = 64, columns: int = 256, groups: int = 1, bits: int = 2, *, fixed: bool = False
) -> PlannedLayer:
    chosen = LayerFormat.model_validate({"bits": bits, "groups_per_row": groups})
    return PlannedLayer(rows, columns, chosen, fixed=fixed)


def nbytes(layers: dict[str, PlannedLayer], bits: dict[str, int]) -> int:
    return sum(
        sketch_nbytes(each.rows, each.columns, bits[name], each.format.groups_per_row)
        for name, each in layers.items()
    )


def weights(layers: dict[str, PlannedLayer]) -> int:
    return sum(each.rows * each.columns for each in layers.values())


def total(errors: Errors, bits: dict[str, int]) -> float:
    return sum(curve[bits[name]] for name, curve in errors.items())


def all_choices(layers: dict[str, PlannedLayer]) -> list[dict[str, int]]:
    options = [(each.format.bits,) if each.fixed else (2, 3, 4) for each in layers.values()]
    return [dict(zip(layers, choice, strict=True)) for choice in itertools.product(*options)]


@st.composite
def instances(draw: st.DrawFn) -> tuple[dict[str, PlannedLayer], Errors]:
    """Up to five layers, errors that fall with bits but need not be convex, some layers fixed."""
    layers, errors = {}, {}
    for index in range(draw(st.integers(1, 5))):
        fixed = index > 0 and draw(st.booleans())
        layers[f"layer{index}"] = layer(
            rows=draw(st.sampled_from([8, 64, 100])),
            columns=draw(st.sampled_from([64, 129, 512])),
            bits=draw(st.sampled_from([2, 3, 4])),
            fixed=fixed,
        )
        if not fixed:
            falls = st.floats(0.001, 10)
            top, middle, end = draw(falls), draw(falls), draw(falls)
            errors[f"layer{index}"] = {2: top + middle + end, 3: middle + end, 4: end}
    return layers, errors


@settings(max_examples=150, deadline=None)
@given(instance=instances(), target=st.floats(2.05, 5))
def test_within_budget_and_one_upgrade_of_the_best(
    instance: tuple[dict[str, PlannedLayer], Errors], target: float
) -> None:
    layers, errors = instance
    budget = target * weights(layers) / 8
    affordable = [bits for bits in all_choices(layers) if nbytes(layers, bits) <= int(budget)]
    if not affordable:
        with pytest.raises(UserError, match="cannot be reached"):
            allocate_bits(layers, errors, target)
        return
    chosen = allocate_bits(layers, errors, target)
    assert list(chosen) == list(layers)
    assert nbytes(layers, chosen) <= budget
    for name, each in layers.items():
        assert chosen[name] == each.format.bits if each.fixed else chosen[name] in (2, 3, 4)
    # Up to the first upgrade that does not fit, the greedy order follows the lower convex hull of
    # the problem, so what is missing to the best is at most what that one upgrade takes off.
    largest = max(curve[2] - curve[4] for curve in errors.values())
    best = min(total(errors, bits) for bits in affordable)
    assert total(errors, chosen) <= best + largest + 1e-9


@settings(max_examples=200, deadline=None)
@given(instance=instances(), target=st.floats(2.05, 5))
def test_no_layer_is_left_below_bits_that_still_fit(
    instance: tuple[dict[str, PlannedLayer], Errors], target: float
) -> None:
    layers, errors = instance
    try:
        chosen = allocate_bits(layers, errors, target)
    except UserError:
        return
    budget = int(target * weights(layers) / 8)
    for name in errors:
        for more in range(chosen[name] + 1, 5):
            assert nbytes(layers, {**chosen, name: more}) > budget, (name, more)


def test_concave_layer_gets_the_small_upgrade_when_the_steep_one_does_not_fit() -> None:
    layers = {"a": layer(columns=4096)}
    errors = {"a": {2: 10.0, 3: 9.0, 4: 0.0}}
    assert allocate_bits(layers, errors, 3.5) == {"a": 3}
    assert allocate_bits(layers, errors, 4.5) == {"a": 4}


def test_the_layer_that_gains_most_gets_the_bits() -> None:
    layers = {name: layer(columns=1024) for name in "abc"}
    errors = {
        "a": {2: 1.0, 3: 0.5, 4: 0.2},
        "b": {2: 9.0, 3: 3.0, 4: 1.0},
        "c": {2: 0.1, 3: 0.05, 4: 0.02},
    }
    assert allocate_bits(layers, errors, 2.1) == {"a": 2, "b": 2, "c": 2}
    assert allocate_bits(layers, errors, 2.5) == {"a": 2, "b": 3, "c": 2}
    assert allocate_bits(layers, errors, 2.8) == {"a": 2, "b": 4, "c": 2}
    assert allocate_bits(layers, errors, 5.0) == {"a": 4, "b": 4, "c": 4}


def test_gain_is_counted_per_byte() -> None:
    layers = {"large": layer(rows=1000), "small": layer(rows=100)}
    errors = {"large": {2: 5.0, 3: 0.0, 4: 0.0}, "small": {2: 4.0, 3: 0.0, 4: 0.0}}
    enough_for_small = 8 * nbytes(layers, {"large": 2, "small": 3}) / weights(layers) + 0.01
    assert allocate_bits(layers, errors, enough_for_small) == {"large": 2, "small": 3}


def test_an_upgrade_that_raises_the_error_is_not_bought() -> None:
    layers = {"a": layer(), "b": layer()}
    errors = {"a": {2: 1.0, 3: 1.5, 4: 2.0}, "b": {2: 1.0, 3: 0.5, 4: 0.7}}
    assert allocate_bits(layers, errors, 5.0) == {"a": 2, "b": 3}


def test_fixed_layers_stay_and_count_towards_the_budget() -> None:
    free = {"a": layer(columns=1024)}
    both = {**free, "b": layer(columns=1024, bits=4, fixed=True)}
    errors = {"a": {2: 3.0, 3: 2.0, 4: 1.0}}
    assert allocate_bits(free, errors, 3.2) == {"a": 3}
    assert allocate_bits(both, errors, 3.2) == {"a": 2, "b": 4}
    assert allocate_bits(both, errors, 4.3) == {"a": 4, "b": 4}


def test_larger_budget_is_never_worse_for_one_convex_layer() -> None:
    layers = {"a": layer()}
    errors = {"a": {2: 4.0, 3: 2.0, 4: 1.0}}
    found = [total(errors, allocate_bits(layers, errors, 2.3 + step / 50)) for step in range(140)]
    assert found == sorted(found, reverse=True)
    assert set(found) == {4.0, 2.0, 1.0}


@pytest.mark.parametrize("columns", [48, 64, 96, 192])
def test_message_names_a_number_that_can_be_reached(columns: int) -> None:
    layers = {"a": layer(columns=columns), "b": layer(columns=columns, bits=4, fixed=True)}
    errors = {"a": {2: 3.0, 3: 2.0, 4: 1.0}}
    with pytest.raises(UserError, match=r"--target-bits 2\.01 cannot be reached") as caught:
        allocate_bits(layers, errors, 2.01)
    found = re.search(r"least is ([\d.]+) bits", str(caught.value))
    assert found is not None
    least = 8 * nbytes(layers, {"a": 2, "b": 4}) / weights(layers)
    assert float(found[1]) == pytest.approx(least, abs=2e-3)
    assert allocate_bits(layers, errors, float(found[1])) == {"a": 2, "b": 4}
