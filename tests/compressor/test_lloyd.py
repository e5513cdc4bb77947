"""Weighted one-dimensional Lloyd against scikit-learn, and what holds for every result."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from spallm_serve.compressor import lloyd
from spallm_serve.compressor.lloyd import lloyd_tables

pytestmark = pytest.mark.usefixtures("loops")


def objective(values: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
    """Weighted squared distance to the nearest entry, float64 ``[rows]``."""
    distance = (values.double()[:, :, None] - tables.double()[:, None, :]) ** 2
    return (distance.amin(dim=2) * weights.double()).sum(dim=1)


def random_problem(rows: int, columns: int, skew: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return values, torch.exp(skew * torch.randn(columns, generator=generator))


def sklearn_inertia(values: Tensor, weights: Tensor, clusters: int, linspace: bool) -> float:
    total = 0.0
    for row in values.double().numpy():
        spaced = np.linspace(row.min(), row.max(), clusters)[:, None]
        model = KMeans(
            clusters, init=spaced if linspace else "k-means++", n_init=1, tol=0, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            total += model.fit(row[:, None], sample_weight=weights.double().numpy()).inertia_
    return total


@pytest.mark.parametrize("clusters", [4, 8, 16])
@pytest.mark.parametrize("linspace", [False, True], ids=["kmeans++", "linspace"])
def test_no_worse_than_scikit_learn(clusters: int, linspace: bool) -> None:
    values, weights = random_problem(40, 512, skew=1.0)
    found = float(objective(values, weights, lloyd_tables(values, weights, clusters)).sum())
    # Both stop in local optima, so single rows differ either way; the sum over rows must not.
    # The tolerance is for a row or two whose last few iterations differ.
    assert found <= sklearn_inertia(values, weights, clusters, linspace) * (1 + 1e-3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 60),
    clusters=st.sampled_from([2, 4, 8, 16]),
    skew=st.floats(0, 3),
    zeros=st.floats(0, 1),
    scale=st.sampled_from([1e-6, 0.02, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_result_is_sorted_inside_the_row_and_no_worse_than_even_spacing(
    rows: int,
    columns: int,
    clusters: int,
    skew: float,
    zeros: float,
    scale: float,
    offset: float,
    seed: int,
) -> None:
    values, weights = random_problem(rows, columns, skew, seed)
    values = (values + offset) * scale
    weights[torch.rand(columns, generator=torch.Generator().manual_seed(seed)) < zeros] = 0
    tables = lloyd_tables(values, weights, clusters)
    assert tables.dtype == torch.float32
    assert tables.shape == (rows, clusters)
    assert bool((tables.diff(dim=1) >= 0).all())
    low, high = values.aminmax(dim=1, keepdim=True)
    slack = 1e-6 * scale
    assert bool(((tables >= low - slack) & (tables <= high + slack)).all())
    spaced = low + (high - low) * torch.linspace(0, 1, clusters)
    best = objective(values, weights, spaced)
    assert bool((objective(values, weights, tables) <= best * (1 + 1e-5) + 1e-9 * scale**2).all())


def test_every_entry_in_use_is_the_weighted_mean_of_its_interval() -> None:
    values, weights = random_problem(20, 80, skew=1.0)
    weights[::5] = 0
    for clusters in (4, 8, 16):
        tables = lloyd_tables(values, weights, clusters).double()
        nearest = (values.double()[:, :, None] - tables[:, None, :]).abs().argmin(dim=2)
        for row in range(len(values)):
            for entry in range(clusters):
                mine = nearest[row] == entry
                mass = weights[mine].double().sum()
                if mass > 0:
                    mean = (weights[mine].double() * values[row, mine]).sum() / mass
                    torch.testing.assert_close(tables[row, entry], mean, rtol=1e-5, atol=1e-6)


def test_scale_of_the_weights_does_not_matter() -> None:
    values, weights = random_problem(8, 64, skew=1.0)
    assert torch.equal(lloyd_tables(values, weights, 8), lloyd_tables(values, weights * 1024, 8))


def test_order_of_the_columns_does_not_matter() -> None:
    values, weights = random_problem(8, 64, skew=1.0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled = lloyd_tables(values[:, order], weights[order], 8)
    torch.testing.assert_close(shuffled, lloyd_tables(values, weights, 8))


def test_values_without_weight_do_not_pull() -> None:
    values = torch.tensor([[0.0, 0.1, 5.0, 9.9, 10.0]])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    tables = lloyd_tables(values, weights, 2)
    torch.testing.assert_close(tables, torch.tensor([[0.05, 9.95]]))


def test_one_heavy_value_gets_an_entry_of_its_own() -> None:
    values, weights = random_problem(10, 50, skew=0.0)
    weights[7] = 1e8
    tables = lloyd_tables(values, weights, 4)
    assert float((tables - values[:, 7:8]).abs().amin(dim=1).max()) < 1e-4


def test_entries_stay_inside_the_row_under_extremely_skewed_weights() -> None:
    values = 100 + torch.linspace(-2, 2, 64).unsqueeze(0)
    weights = torch.cat([torch.ones(32), torch.full((32,), 1e-14)])
    tables = lloyd_tables(values, weights, 4)
    assert float(tables.min()) >= 98
    assert float(tables.max()) <= 102


def test_all_weights_zero_still_gives_finite_sorted_tables() -> None:
    values, weights = random_problem(5, 30, skew=0.0)
    tables = lloyd_tables(values, torch.zeros_like(weights), 4)
    low, high = values.aminmax(dim=1, keepdim=True)
    assert bool(((tables >= low - 1e-6) & (tables <= high + 1e-6)).all())
    assert bool((tables.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("value", [0.0, -3.25, 1e-8, 6e4])
def test_constant_rows(value: float) -> None:
    values, weights = random_problem(3, 30, skew=1.0)
    values[1] = value
    tables = lloyd_tables(values, weights, 8)
    torch.testing.assert_close(tables[1], torch.full((8,), value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("distinct", [1, 2, 3, 5, 8])
def test_as_many_entries_as_distinct_values_lose_nothing(distinct: int) -> None:
    generator = torch.Generator().manual_seed(distinct)
    levels = torch.randn(4, distinct, generator=generator)
    values = levels.repeat(1, 6)
    weights = torch.rand(6 * distinct, generator=generator) + 0.1
    tables = lloyd_tables(values, weights, 8)
    gaps = (levels[:, :, None] - tables[:, None, :]).abs().amin(dim=2)
    assert float(gaps.max()) < 1e-6


def test_fewer_columns_than_clusters() -> None:
    values, weights = random_problem(4, 3, skew=1.0)
    tables = lloyd_tables(values, weights, 16)
    torch.testing.assert_close(objective(values, weights, tables), torch.zeros(4).double())


def test_no_rows() -> None:
    assert lloyd_tables(torch.zeros(0, 8), torch.ones(8), 4).shape == (0, 4)


def test_chunks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = random_problem(23, 64, skew=1.0)
    whole = lloyd_tables(values, weights, 8)
    for elements in (1, 5 * 64, 22 * 64):
        monkeypatch.setattr(lloyd, "_CHUNK_ELEMENTS", elements)
        assert torch.equal(lloyd_tables(values, weights, 8), whole)


def test_inputs_are_left_alone() -> None:
    values, weights = random_problem(3, 20, skew=1.0)
    copies = values.clone(), weights.clone()
    lloyd_tables(values, weights, 4)
    assert torch.equal(values, copies[0])
    assert torch.equal(weights, copies[1])
