"""Which values are numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spallm_serve.precision import all_finite

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(
    dtype=st.sampled_from(FLOATS),
    shape=st.lists(st.integers(0, 5), max_size=3),
    value=st.floats(width=16),
    transposed=st.booleans(),
)
def test_it_says_what_isfinite_says(
    dtype: torch.dtype, shape: list[int], value: float, transposed: bool
) -> None:
    tensor = torch.randn(shape).to(dtype)
    if tensor.numel():
        tensor.view(-1)[tensor.numel() // 2] = value
    if transposed:
        tensor = tensor.movedim(0, -1) if tensor.dim() else tensor
    assert all_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_number_is_one_and_no_nan_is(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    numbers = torch.tensor([limits.max, limits.min, limits.tiny, -0.0], dtype=dtype)
    assert all_finite(numbers)
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite(torch.cat([numbers, torch.tensor([value], dtype=dtype)]))
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[limits.bits // 8]
    # Every NaN has its exponent's bits set; the one with the lowest other bit, and a negative one.
    least = torch.tensor([float("inf")], dtype=dtype).view(words) + 1
    assert not all_finite(least.view(dtype))
    assert not all_finite(-least.view(dtype))
