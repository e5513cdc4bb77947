"""What ``auto`` makes of measured losses, and how it measures them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from spallm_serve.trainer.sparselora.blocks import find_sites
from spallm_serve.trainer.sparselora.estimators import load_estimators
from spallm_serve.trainer.sparselora.flops import base_flops, block_shape
from spallm_serve.trainer.sparselora.install import Installed
from spallm_serve.trainer.sparselora.plan import SparsityPlan
from spallm_serve.trainer.sparselora.sensitivity import (
    LEVELS,
    Choice,
    allocate,
    candidate_plan,
    measure_choices,
)
from spallm_serve.trainer.sparselora.tokens import CurrentBatch, split_batch
from tests.spallm_serve.trainer.sparselora_models import loss_of, make_batch, tiny


def test_the_ends_are_no_candidates() -> None:
    plan = candidate_plan(4, 1)
    assert plan.mlp == (0, 0.99, 0.99, 0)
    assert plan.self_attn == (0, 0.75, 0.75, 0)
    assert candidate_plan(2, 0).is_dense


def test_a_large_budget_buys_everything() -> None:
    choices = {"a": [Choice(0.5, 1, 10), Choice(0.9, 2, 20)], "b": [Choice(0.5, 1, 1)]}
    assert allocate(choices, 3) == {"a": 0.9, "b": 0.5}


def test_no_budget_buys_what_costs_nothing() -> None:
    choices = {"a": [Choice(0.5, -0.1, 10), Choice(0.9, 2, 20)], "b": [Choice(0.5, 1, 1)]}
    assert allocate(choices, 0) == {"a": 0.5, "b": 0}


def test_the_cheapest_saving_comes_first() -> None:
    choices = {
        "a": [Choice(0.5, 1, 10), Choice(0.9, 4, 13)],
        "b": [Choice(0.5, 1, 9), Choice(0.9, 2, 17)],
    }
    assert allocate(choices, 1) == {"a": 0.5, "b": 0}
    assert allocate(choices, 2.5) == {"a": 0.5, "b": 0.5}
    assert allocate(choices, 3) == {"a": 0.5, "b": 0.9}


def test_what_does_not_fit_leaves_room_for_what_does() -> None:
    choices = {"a": [Choice(0.5, 5, 100)], "b": [Choice(0.5, 1, 1)]}
    assert allocate(choices, 4) == {"a": 0, "b": 0.5}


@pytest.mark.parametrize("seed", range(20))
def test_the_greedy_choice_fits_and_is_not_far_from_the_best(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    choices = {}
    for site in "abcd":
        low, high = torch.rand(2, generator=generator).tolist()
        small, large = torch.rand(2, generator=generator).tolist()
        choices[site] = [Choice(0.5, low, small), Choice(0.9, low + high, small + large)]
    budget = 2.0

    def of(site: str, sparsity: float) -> Choice:
        return next((c for c in choices[site] if c.sparsity == sparsity), Choice(0, 0, 0))

    found = [of(site, sparsity) for site, sparsity in allocate(choices, budget).items()]
    assert sum(choice.increase for choice in found) <= budget
    best = max(
        sum(choice.saving for choice in combination)
        for combination in itertools.product(
            *([Choice(0, 0, 0), *choices[site]] for site in choices)
        )
        if sum(choice.increase for choice in combination) <= budget
    )
    assert sum(choice.saving for choice in found) >= 0.6 * best


def test_each_site_is_measured_with_all_else_dense() -> None:
    model = tiny("grouped")
    shape = block_shape(model)
    assert shape is not None
    sites = find_sites(model, candidate_plan(3, 0))
    linears = {name: linear for site in sites for name, linear in site.estimated.items()}
    factors = load_estimators(linears, 4, None, None)
    batches = [make_batch(seed=seed) for seed in (5, 6)]
    alone = copy.deepcopy(model)
    found = measure_choices(
        model, sites, factors, shape, batches, lambda batch: loss_of(model, batch)
    )
    assert set(found) == {"model.layers.1.self_attn", "model.layers.1.mlp"}
    for kind, levels in LEVELS.items():
        for choice, level in zip(found[f"model.layers.1.{kind}"], levels, strict=True):
            plans = {"mlp": (0.0,) * 3, "self_attn": (0.0,) * 3, kind: (0.0, level, 0.0)}
            twin = copy.deepcopy(alone)
            current = CurrentBatch()
            Installed(find_sites(twin, SparsityPlan(**plans)), factors, current)
            increase = 0.0
            for batch in batches:
                current.split = split_batch(batch)
                with torch.no_grad():
                    dense = float(loss_of(twin.eval(), batch))
                    increase += (float(loss_of(twin.train(), batch)) / dense - 1) / 2
            assert choice.increase == pytest.approx(increase, abs=1e-6)
            sparse = base_flops(shape, level if kind == "mlp" else 0, level if kind != "mlp" else 0)
            assert choice.sparsity == level
            assert choice.saving == base_flops(shape) - sparse
