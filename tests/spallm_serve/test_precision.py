"""Which values are numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spallm_serve.precision import all_finite, first_not_finite

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


@given(
    counts=st.lists(st.sampled_from([0, 1, 40, 70_000]), min_size=1, max_size=80),
    wrong=st.integers(0, 100),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_the_tensor_that_is_not_finite_is_found(
    counts: list[int], wrong: int, value: float
) -> None:
    """Among others of any sizes and types, integers too."""
    kinds = (torch.float16, torch.float32, torch.int32)
    tensors = {
        f"{number}": torch.ones(count, dtype=kinds[number % len(kinds)])
        for number, count in enumerate(counts)
    }
    assert first_not_finite(tensors) is None
    tensor = tensors.get(f"{wrong}")
    if tensor is not None and tensor.numel() and tensor.is_floating_point():
        tensor[-1] = value
        assert first_not_finite(tensors) == f"{wrong}"


def test_a_large_tensor_is_looked_at_to_its_end() -> None:
    large = torch.zeros((1 << 20) + 3, dtype=torch.float16)
    large[-1] = torch.nan
    assert first_not_finite({"a": torch.zeros(3), "b": large}) == "b"
