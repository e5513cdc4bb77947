"""Tables become 8-bit and 16-bit integers: the nearest to their entries, a scale for each row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spallm_serve.kernels.backend import Request
from spallm_serve.kernels.cpu.backend import CpuBackend
from spallm_serve.kernels.cpu.integers import (
    LARGEST_ENTRY,
    from_integers,
    to_integers,
    to_integers_together,
)

native = pytest.mark.skipif(
    CpuBackend("scalar").why_not(Request("cpu", torch.float32, 4, 8, 8, 1)) is not None,
    reason="no compiled kernels",
)


@native
@pytest.mark.parametrize("kind", LARGEST_ENTRY)
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([(3, 1, 16), (2, 3, 2, 8), (1, 1, 1, 4)]),
    st.integers(-20, 10),
    st.integers(0, 10**6),
)
def test_entries_are_the_nearest_multiples_of_a_rows_scale(
    kind: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...], exponent: int, seed: int
) -> None:
    tables = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tables = (tables * 2.0**exponent).to(dtype)
    tables[0] = 0
    values, scales = to_integers(tables, kind)
    assert values.dtype == kind and values.abs().max() <= LARGEST_ENTRY[kind]
    assert scales.shape == tables.shape[:-2] and not scales[0].any() and not values[0].any()
    wrong = (from_integers(values, scales).double() - tables.double()).abs()
    # Half a unit, and what float32 rounds.
    assert (wrong <= 0.501 * scales.double()[..., None, None]).all()


@native
@pytest.mark.parametrize("kind", LARGEST_ENTRY)
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([(70, 1, 16), (3, 2, 8), (5, 7, 4)]),
    st.sampled_from([-40, -20, 0, 10, 60]),
    st.integers(0, 10**6),
)
def test_integers_are_those_of_the_formula(
    kind: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...], exponent: int, seed: int
) -> None:
    """To the bit, of what torch computes one operation after another."""
    tables = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    tables = tables.to(dtype)
    tables[0, 0, 0], tables[1, 0, 0], tables[2, 0, 0] = torch.nan, -torch.inf, 0
    values, scales = to_integers(tables, kind)
    most = tables.float().abs().amax((-2, -1))
    expected = most / LARGEST_ENTRY[kind]
    usable = (expected > torch.finfo(torch.float32).tiny) & expected.isfinite()
    if kind == torch.int8:
        candidates = most / (127 - 1.5 * torch.arange(16.0))[:, None]
        assert (scales == candidates).any(0)[usable].all()
        expected = torch.where(usable, scales, expected)
    inverse = torch.where(usable, expected.reciprocal(), 0.0)[:, None, None]
    assert values.equal((tables.float() * inverse).round().nan_to_num(0.0).to(kind))
    kept = torch.where(usable | ~expected.isfinite(), expected, 0.0)
    assert torch.allclose(scales, kept, rtol=0, atol=0, equal_nan=True)


@native
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_of_several_scales_of_8_bits_the_best_is_taken(bits: int) -> None:
    tables = torch.randn(200, 1, 1 << bits, generator=torch.Generator().manual_seed(bits))
    found = from_integers(*to_integers(tables, torch.int8)).double()
    wrong = (found - tables.double()).square().sum((1, 2))
    largest = tables.double().abs().amax((1, 2))
    tried = []
    for number in range(16):
        scale = (largest / (127 - 1.5 * number))[:, None, None]
        rounded = (tables.double() / scale).round() * scale
        tried.append((rounded - tables.double()).square().sum((1, 2)))
    least = torch.stack(tried).amin(0)
    assert torch.allclose(wrong, least, rtol=1e-3)
    assert wrong.sum() < 0.85 * tried[0].sum()


@native
def test_scales_are_float32_whatever_torchs_default_is() -> None:
    """vLLM sets it to the dtype of the activations while it loads a model."""
    tables = torch.randn(5, 1, 4)
    expected = to_integers(tables, torch.int16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [
            to_integers(tables, torch.int16),
            *to_integers_together([tables], torch.int16),
        ]
    finally:
        torch.set_default_dtype(before)
    for values, scales in found:
        assert scales.dtype == torch.float32
        assert values.equal(expected[0]) and scales.equal(expected[1])


@native
@pytest.mark.parametrize("dtype", LARGEST_ENTRY)
def test_several_become_integers_as_each_does_alone(dtype: torch.dtype) -> None:
    several = [torch.randn(rows, 2, 8).half() for rows in (3, 1, 6)]
    together = to_integers_together(several, dtype)
    for tables, (values, scales) in zip(several, together, strict=True):
        alone = to_integers(tables, dtype)
        assert values.equal(alone[0]) and scales.equal(alone[1])


@native
@pytest.mark.parametrize("dtype", LARGEST_ENTRY)
def test_rows_that_hold_no_numbers_are_none_and_others_are(dtype: torch.dtype) -> None:
    tables = torch.ones(4, 1, 4)
    tables[1, 0, 2], tables[2, 0, 0] = torch.nan, torch.inf
    tables[3] = 1e-42
    values, scales = to_integers(tables, dtype)
    assert scales.isfinite().tolist() == [True, False, False, True]
    assert values.abs().max() <= LARGEST_ENTRY[dtype]
    torch.testing.assert_close(from_integers(values, scales)[0], tables[0])
