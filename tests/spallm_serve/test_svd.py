"""The randomised estimator against the exact singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spallm_serve.svd import svd_estimator


def decaying(rows: int, columns: int, decay: float = 0.8) -> Tensor:
    """A matrix with singular values 10, 10 * decay, ..."""
    generator = torch.Generator().manual_seed(rows)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator)).Q
    return (left * (10 * decay ** torch.arange(size))) @ right.T


def best_product(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, singular, right = torch.linalg.svd(weight.T.double(), full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank], singular


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 40)])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_close_to_the_best_approximation_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    weight = decaying(*shape)
    a, b, energy = svd_estimator(weight, rank, seed=0)
    assert (a.dtype, b.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (a.shape, b.shape) == ((shape[1], rank), (rank, shape[0]))
    assert a.is_contiguous()
    assert b.is_contiguous()
    best, singular = best_product(weight, rank)
    exact = singular[:rank].square().sum() / singular.square().sum()
    assert energy == pytest.approx(float(exact), abs=1e-3)
    distance = (a.double() @ b.double() - best).norm() / best.norm()
    assert float(distance) < 0.01  # bfloat16 has 8 bits of mantissa


def test_flat_spectrum_keeps_nearly_as_much_as_the_best() -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    a, b, energy = svd_estimator(weight, 8, seed=0)
    _, singular = best_product(weight, 8)
    exact = singular[:8].square().sum() / singular.square().sum()
    assert energy == pytest.approx(float(exact), abs=5e-3)
    kept = 1 - (a.double() @ b.double() - weight.T.double()).norm() ** 2 / weight.norm() ** 2
    assert float(kept) == pytest.approx(float(exact), abs=5e-3)


def test_singular_values_are_split_evenly() -> None:
    weight = decaying(50, 70)
    a, b, _ = svd_estimator(weight, 5, seed=0)
    singular = torch.linalg.svdvals(weight)[:5]
    torch.testing.assert_close(a.float().norm(dim=0), singular.sqrt(), rtol=0.01, atol=0)
    torch.testing.assert_close(b.float().norm(dim=1), singular.sqrt(), rtol=0.01, atol=0)


def test_product_estimates_the_output_of_the_linear() -> None:
    weight = decaying(50, 70, decay=0.5)
    inputs = torch.randn(20, 70, generator=torch.Generator().manual_seed(1))
    a, b, _ = svd_estimator(weight, 8, seed=0)
    outputs = torch.nn.functional.linear(inputs, weight)
    assert float((inputs @ a.float() @ b.float() - outputs).norm() / outputs.norm()) < 0.02


def test_rank_beyond_the_matrix_is_cut_to_its_size() -> None:
    weight = decaying(6, 9)
    a, b, energy = svd_estimator(weight, 100, seed=0)
    assert (a.shape, b.shape) == ((9, 6), (6, 6))
    assert energy == pytest.approx(1, abs=1e-5)
    assert float((a.float() @ b.float() - weight.T).norm() / weight.norm()) < 0.01


def test_same_seed_same_factors_and_the_global_generator_is_left_alone() -> None:
    weight = decaying(60, 90)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, energy = svd_estimator(weight, 4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = svd_estimator(weight, 4, seed=3)
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    assert energy == again[2]


def test_zero_matrix_has_zero_factors_and_a_finite_energy() -> None:
    a, b, energy = svd_estimator(torch.zeros(8, 6), 2, seed=0)
    assert not bool(a.any())
    assert not bool(b.any())
    assert 0 <= energy <= 1
