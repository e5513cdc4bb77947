"""What ``auto`` makes of measured costs, and how it measures them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spallm_serve.trainer.flops import block_shape
from spallm_serve.trainer.method import Batch
from spallm_serve.trainer.sparselora import sensitivity
from spallm_serve.trainer.sparselora.allocation import Choice, allocate
from spallm_serve.trainer.sparselora.blocks import Site, find_sites
from spallm_serve.trainer.sparselora.estimators import load_estimators
from spallm_serve.trainer.sparselora.flops import base_flops
from spallm_serve.trainer.sparselora.install import install
from spallm_serve.trainer.sparselora.plan import SparsityPlan
from spallm_serve.trainer.sparselora.select import Factors
from spallm_serve.trainer.sparselora.sensitivity import (
    LEVELS,
    DenseReference,
    candidate_plan,
    measure_choices,
    measure_together,
    sensitivity_plan,
)
from spallm_serve.trainer.sparselora.tokens import CurrentBatch, dense_tokens, split_batch
from tests.spallm_serve.trainer.sparselora_models import make_batch, tiny

SITES = {"model.layers.1.self_attn", "model.layers.1.mlp"}


def test_the_ends_are_no_candidates() -> None:
    plan = candidate_plan(4, 1)
    assert plan.mlp == (0, 0.99, 0.99, 0)
    assert plan.self_attn == (0, 0.75, 0.75, 0)
    assert candidate_plan(2, 0).is_dense


def test_a_large_budget_buys_everything() -> None:
    choices = {"a": [Choice(0.5, 1, 10), Choice(0.9, 2, 20)], "b": [Choice(0.5, 1, 1)]}
    assert allocate(choices, 3) == {"a": 0.9, "b": 0.5}


def test_no_budget_buys_what_costs_nothing() -> None:
    choices = {"a": [Choice(0.5, 0, 10), Choice(0.9, 2, 20)], "b": [Choice(0.5, 1, 1)]}
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
        low, high, small, large = torch.rand(4, generator=generator).tolist()
        choices[site] = [Choice(0.5, low, small), Choice(0.9, low + high, small + large)]
    budget, dense = 2.0, Choice(0.0, 0.0, 0.0)
    found = [
        next(choice for choice in (dense, *choices[site]) if choice.sparsity == sparsity)
        for site, sparsity in allocate(choices, budget).items()
    ]
    assert sum(choice.cost for choice in found) <= budget
    combinations = itertools.product(*([dense, *choices[site]] for site in choices))
    best = max(
        sum(choice.saving for choice in combination)
        for combination in combinations
        if sum(choice.cost for choice in combination) <= budget
    )
    assert sum(choice.saving for choice in found) >= 0.6 * best


def batches() -> list[Batch]:
    return [make_batch(seed=seed) for seed in (5, 6)]


def parts(model: PreTrainedModel) -> tuple[list[Site], dict[str, Factors]]:
    sites = find_sites(model, candidate_plan(3, 0))
    linears = {name: linear for site in sites for name, linear in site.estimated.items()}
    return sites, load_estimators(linears, 4, None, None)


def divergence(model: PreTrainedModel, plans: dict[str, tuple[float, ...]]) -> float:
    """By definition, from the probabilities of a dense and of a sparse model."""
    twin, current = copy.deepcopy(model), CurrentBatch()
    _, factors = parts(model)
    install(find_sites(twin, SparsityPlan(**plans)), factors, current)
    total, count = 0.0, 0
    for batch in batches():
        current.split = split_batch(batch)
        found: list[Tensor] = []
        for mode in (False, True):
            twin.train(mode)
            with torch.no_grad():
                logits = twin(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            found.append(logits.double().softmax(-1)[dense_tokens(batch["labels"])])
        dense, sparse = found
        total += float((dense * (dense.log() - sparse.log())).sum())
        count += len(dense)
    return total / count


def test_each_site_is_measured_with_all_else_dense() -> None:
    model = tiny("grouped")
    shape = block_shape(model)
    assert shape is not None
    sites, factors = parts(model)
    alone = copy.deepcopy(model)
    found = measure_choices(sites, factors, shape, DenseReference(model, batches()))
    assert set(found) == SITES
    for kind, levels in LEVELS.items():
        for choice, level in zip(found[f"model.layers.1.{kind}"], levels, strict=True):
            plans = {"mlp": (0.0,) * 3, "self_attn": (0.0,) * 3, kind: (0.0, level, 0.0)}
            assert choice.cost == pytest.approx(divergence(alone, plans), rel=1e-3, abs=1e-6)
            assert choice.cost > 0
            sparse = base_flops(shape, level if kind == "mlp" else 0, level if kind != "mlp" else 0)
            assert choice.sparsity == level
            assert choice.saving == base_flops(shape) - sparse


def test_sites_are_measured_together() -> None:
    model = tiny("grouped")
    sites, factors = parts(model)
    found = measure_together(sites, factors, DenseReference(model, batches()))
    plan = candidate_plan(3, 0)
    wanted = divergence(model, {"mlp": plan.mlp, "self_attn": plan.self_attn})
    assert found == pytest.approx(wanted, rel=1e-3)


def plan_of(model: PreTrainedModel, limit: float, with_mlp: bool = True) -> SparsityPlan:
    def factors(sites: object) -> dict[str, Factors]:
        return parts(model)[1]

    return sensitivity_plan(model, factors, batches(), with_mlp, limit)


def test_the_limit_decides() -> None:
    model = tiny("grouped")
    generous = plan_of(model, 1e3)
    assert generous.mlp == (0, 0.99, 0)
    assert generous.self_attn == (0, 0.75, 0)
    assert plan_of(model, 0.0).is_dense
    assert plan_of(model, 1e3, with_mlp=False).mlp == (0, 0, 0)


def test_costs_that_do_not_add_up_tighten_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("grouped")
    sites, factors = parts(model)
    shape = block_shape(model)
    assert shape is not None
    measured = measure_choices(sites, factors, shape, DenseReference(model, batches()))
    limit = sum(choices[-1].cost for choices in measured.values())
    tried: list[set[str]] = []

    def together(chosen: list[Site], *_: object) -> float:
        tried.append({site.name for site in chosen})
        return 2 * limit if len(chosen) > 1 else limit / 2

    monkeypatch.setattr(sensitivity, "measure_together", together)
    plan = plan_of(model, limit)
    assert tried[0] == SITES
    assert len(tried[-1]) <= 1
    assert (plan.mlp[1] > 0) + (plan.self_attn[1] > 0) == len(tried[-1])


def test_a_model_without_inner_layers() -> None:
    model = tiny("grouped")
    model.config.num_hidden_layers = 2
    del model.model.layers[2]
    assert plan_of(model, 1e3).is_dense
