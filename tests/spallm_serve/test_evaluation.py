"""Perplexity, divergence and multiple choice against direct computations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from spallm_serve.evaluation import (
    Estimate,
    compare,
    mean_estimate,
    perplexity,
    perplexity_estimate,
    token_loss_estimate,
    window_loss,
)
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    source = save_tiny("llama", tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(source).eval()


@pytest.fixture(scope="module")
def other(model: PreTrainedModel) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.add_(0.04 * torch.randn(weight.shape, generator=generator))
    return changed


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(3, 131, (5, 13), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def exact_logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(input_ids=window[None]).logits[0, :-1]


def spread(values: list[float]) -> float:
    """Standard error of a mean by its formula."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def test_perplexity_is_that_of_the_models_own_loss(model: PreTrainedModel, windows: Tensor) -> None:
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        losses = [float(exact(input_ids=w[None], labels=w[None]).loss) for w in windows]
    seen: list[int] = []
    found = perplexity(model, windows, seen.append)
    wanted = math.exp(sum(losses) / len(losses))
    assert found.value == pytest.approx(wanted, rel=1e-5)
    assert found.standard_error == pytest.approx(wanted * spread(losses), rel=1e-4)
    assert seen == [1, 2, 3, 4, 5]


def test_standard_errors() -> None:
    values = [1.0, 4.0, -2.0, 0.5]
    found = mean_estimate(torch.tensor(values))
    assert found.value == pytest.approx(0.875)
    assert found.standard_error == pytest.approx(spread(values))
    found = perplexity_estimate(torch.tensor(values))
    assert found.value == pytest.approx(math.exp(0.875))
    assert found.standard_error == pytest.approx(math.exp(0.875) * spread(values))
    assert mean_estimate(torch.tensor([3.0])).value == 3
    assert math.isnan(mean_estimate(torch.tensor([3.0])).standard_error)
    assert str(Estimate(1.23456, 0.0123)) == "1.235 ± 0.012"


def test_window_loss() -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    window = torch.tensor([[0, 3, 6, 1, 1]])
    probabilities = logits.double().softmax(-1)
    wanted = -sum(math.log(float(probabilities[i, window[0, i + 1]])) for i in range(4)) / 4
    assert float(window_loss(logits.log_softmax(-1), window)) == pytest.approx(wanted, rel=1e-5)


def test_a_model_is_its_own_equal(model: PreTrainedModel, windows: Tensor) -> None:
    found = compare(model, model, windows)
    assert found.divergence == Estimate(0, 0)
    assert found.agreement == Estimate(1, 0)
    assert found.original == found.compressed == perplexity(model, windows)
    assert (found.windows, found.tokens) == (5, 5 * 12)


def test_divergence_and_agreement(
    model: PreTrainedModel, other: PreTrainedModel, windows: Tensor
) -> None:
    divergences, agreements = [], []
    for window in windows:
        p, q = (exact_logits(each, window).softmax(-1) for each in (model, other))
        rows = [
            sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(*row, strict=True))
            for row in zip(p, q, strict=True)
        ]
        divergences.append(sum(rows) / len(rows))
        same = [float(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)]
        agreements.append(sum(same) / len(same))
    seen: list[int] = []
    found = compare(model, other, windows, seen.append)
    assert found.divergence.value == pytest.approx(sum(divergences) / 5, rel=1e-4)
    assert found.divergence.standard_error == pytest.approx(spread(divergences), rel=1e-3)
    assert 0 < found.agreement.value < 1
    assert found.agreement.value == pytest.approx(sum(agreements) / 5, rel=1e-6)
    assert found.agreement.standard_error == pytest.approx(spread(agreements), rel=1e-5)
    assert found.compressed.value == pytest.approx(perplexity(other, windows).value)
    assert seen == [1, 2, 3, 4, 5]
    assert compare(other, model, windows).divergence != found.divergence


def test_loss_of_a_token_over_examples_of_several_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (400,), generator=generator).double()
    sums = counts * 2 + torch.randn(400, generator=generator, dtype=torch.float64)
    found = token_loss_estimate(sums, counts)
    assert found.value == pytest.approx(float(sums.sum() / counts.sum()))
    draws = torch.randint(400, (4000, 400), generator=generator)
    resampled = sums[draws].sum(1) / counts[draws].sum(1)
    assert found.standard_error == pytest.approx(float(resampled.std()), rel=0.1)
    # Of examples of one length it is the mean's own.
    equal = token_loss_estimate(sums, torch.full((400,), 2.0))
    assert equal.standard_error == pytest.approx(mean_estimate(sums / 2).standard_error)
    assert math.isnan(token_loss_estimate(sums[:1], counts[:1]).standard_error)
