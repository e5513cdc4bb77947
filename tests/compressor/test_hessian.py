"""Accumulating Hessians and factoring their inverse, against float64 linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spallm_serve.compressor import hessian
from spallm_serve.compressor.hessian import (
    MAX_DAMPING_RAISES,
    HessianAccumulator,
    add_products,
    damped_factor,
    settle_dead_columns,
)

pytestmark = pytest.mark.usefixtures("loops")


def random_inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing


def random_hessian(columns: int, seed: int = 0) -> Tensor:
    inputs = random_inputs(3 * columns, columns, seed)
    return 2 * inputs.T @ inputs / len(inputs)


def exact_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped, permuted Hessian in float64."""
    damped = hessian.double()
    damped = damped + damping * damped.diagonal().mean() * torch.eye(len(damped))
    return torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_accumulator_equals_two_over_n_times_the_gram_matrix(dtype: torch.dtype) -> None:
    inputs = random_inputs(70, 9).to(dtype)
    accumulator = HessianAccumulator(9)
    accumulator.add(inputs[:1])
    accumulator.add(inputs[1:31].view(2, 15, 9))
    accumulator.add(inputs[31:31])
    accumulator.add(inputs[31:67].view(3, 4, 3, 9))
    accumulator.add(inputs[67:])
    found = accumulator.finish()
    exact = 2 / 70 * inputs.double().T @ inputs.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 15, 16, 47, 64, 130])
@pytest.mark.parametrize("tokens", [1, 2, 511, 515])
def test_products_of_any_shape(columns: int, tokens: int) -> None:
    """bfloat16 activations have a loop of their own, in tiles of columns and pairs of tokens."""
    a, b = (random_inputs(tokens, columns, seed).bfloat16() for seed in (0, 1))
    for other in (a, b):
        total = torch.ones(columns, columns)
        add_products(total, a, other)
        exact = 1 + a.double().T @ other.double()
        if other is a:
            total, exact = total.triu(), exact.triu()
        torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4 * columns)


def test_strided_activations_are_read_right() -> None:
    wide = random_inputs(40, 24).bfloat16()
    total = torch.zeros(8, 8)
    add_products(total, wide[:, ::3], wide[:, 1::3])
    exact = wide[:, ::3].double().T @ wide[:, 1::3].double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("columns", [1, 5, 256, 300, 515])
def test_what_is_turned_over_in_place(columns: int) -> None:
    matrix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0))
    expected = matrix.triu() + matrix.triu(1).T
    assert torch.equal(hessian._mirrored(matrix.clone()), expected)
    assert torch.equal(hessian._turned_round(matrix.clone()), matrix.flip(0, 1))


def test_accumulator_takes_a_single_token_and_leaves_it_alone() -> None:
    token = torch.tensor([1.0, 2.0, -3.0])
    accumulator = HessianAccumulator(3)
    accumulator.add(token)
    torch.testing.assert_close(accumulator.finish(), 2 * torch.outer(token, token))
    assert token.tolist() == [1.0, 2.0, -3.0]


def test_dead_columns_get_a_unit_diagonal_in_place() -> None:
    inputs = random_inputs(40, 6)
    inputs[:, [1, 4]] = 0
    hessian = 2 * inputs.T @ inputs / 40
    before = hessian.clone()
    dead = settle_dead_columns(hessian)
    assert dead.tolist() == [False, True, False, False, True, False]
    assert torch.equal(hessian - before, torch.diag(dead.float()))


def test_live_hessian_is_unchanged_by_settling() -> None:
    hessian = random_hessian(5)
    before = hessian.clone()
    assert not bool(settle_dead_columns(hessian).any())
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("columns", [1, 2, 33, 300, 513])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.1, 1.0])
def test_factor_equals_the_cholesky_of_the_inverse(columns: int, damping: float) -> None:
    hessian = random_hessian(columns) + 0.1 * torch.eye(columns)
    original = hessian.clone()
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    factor = damped_factor(hessian, order, damping)
    assert factor.upper is not None
    assert (factor.damping, factor.raises) == (damping, 0)
    assert factor.upper.dtype == torch.float32
    assert torch.equal(factor.upper, factor.upper.triu())
    exact = exact_factor(hessian, order, damping)
    # Without damping, 513 columns leave float32 three digits.
    torch.testing.assert_close(factor.upper.double(), exact, rtol=1e-3, atol=5e-4 * exact.max())
    assert torch.equal(hessian, original)


def test_dead_columns_stand_alone_in_the_factor() -> None:
    hessian = random_hessian(8)
    hessian[3], hessian[:, 3] = 0, 0
    settle_dead_columns(hessian)
    factor = damped_factor(hessian, torch.arange(8), 0.1)
    assert factor.upper is not None
    expected = float((1 + 0.1 * hessian.diagonal().mean()) ** -0.5)
    assert float(factor.upper[3, 3]) == pytest.approx(expected, rel=1e-5)
    assert torch.count_nonzero(factor.upper[3]) == 1
    assert torch.count_nonzero(factor.upper[:, 3]) == 1


@pytest.mark.parametrize(
    ("start", "raises", "end"), [(0.01, 2, 1.0), (0.1, 1, 1.0), (0.4, 1, 4.0), (0.0, 5, 1.0)]
)
def test_indefinite_hessian_raises_the_damping_tenfold(
    start: float, raises: int, end: float
) -> None:
    hessian = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # eigenvalues -0.5 and 2.5
    order = torch.tensor([1, 0])
    factor = damped_factor(hessian, order, start)
    assert factor.raises == raises
    assert factor.damping == pytest.approx(end)
    assert factor.upper is not None
    exact = exact_factor(hessian, order, end)
    torch.testing.assert_close(factor.upper.double(), exact, rtol=1e-4, atol=1e-5)


def hopeless_hessians() -> dict[str, Tensor]:
    one_nan = random_hessian(4)
    one_nan[2, 1] = one_nan[1, 2] = float("nan")
    infinite = random_hessian(4)
    infinite[3, 3] = float("inf")
    return {
        "negative definite": -torch.eye(4),
        "all nan": torch.full((4, 4), float("nan")),
        "one nan": one_nan,
        "infinite": infinite,
        "zero": torch.zeros(4, 4),
    }


@pytest.mark.parametrize("case", hopeless_hessians())
def test_hopeless_hessian_gives_no_factor(case: str) -> None:
    factor = damped_factor(hopeless_hessians()[case], torch.arange(4), 0.1)
    assert factor.upper is None
    assert factor.raises == MAX_DAMPING_RAISES


def test_hopeless_hessian_reports_the_last_damping_that_was_tried() -> None:
    factor = damped_factor(-torch.eye(4), torch.arange(4), 0.1)
    assert factor.damping == pytest.approx(0.1 * 10**MAX_DAMPING_RAISES)
