"""Correcting a weight for the drift of its inputs."""

from __future__ import annotations

import pytest
import torch

from spallm_serve.compressor.drift import DriftAccumulator
from spallm_serve.compressor.hessian import HessianAccumulator

pytestmark = pytest.mark.usefixtures("loops")


def inputs(seed: int, tokens: int = 300, columns: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    original = torch.randn(tokens, columns, generator=generator) @ mixing
    noise = torch.randn(tokens, columns, generator=generator)
    return original, original + 0.3 * original.roll(1, dims=1) + 0.2 * noise


def corrected(
    weight: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], damping: float
) -> torch.Tensor:
    columns = weight.shape[1]
    drift = DriftAccumulator(HessianAccumulator(columns), columns, torch.device("cpu"))
    for original, compressed in pairs:
        drift.add(original, compressed)
    before = weight.clone()
    target = drift.corrected({"w": weight}, damping)["w"]
    assert torch.equal(weight, before)
    return target


def test_is_the_ridge_regression_onto_the_originals_outputs() -> None:
    original, compressed = inputs(0)
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    pairs = [
        (original[rows].view(2, -1, 24), compressed[rows].view(2, -1, 24))
        for rows in (slice(0, 100), slice(100, 300))
    ]
    found = corrected(weight, pairs, damping=0.05)

    x, y = original.double(), compressed.double()
    hessian = 2 / 300 * y.T @ y
    ridge = 0.05 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    change = weight.double() @ (2 / 300 * (x - y).T @ y) @ torch.linalg.inv(hessian + ridge)
    torch.testing.assert_close(found.double(), weight + change, rtol=1e-4, atol=1e-4)


def test_no_drift_no_correction() -> None:
    original, _ = inputs(2)
    weight = torch.randn(5, 24)
    torch.testing.assert_close(corrected(weight, [(original, original)], 0.1), weight)


def test_a_massive_token_is_not_corrected_too_far() -> None:
    """Attention sinks have activations hundreds of times the others'. Corrected with a Hessian of
    more tokens than the drift was seen on, they overshot, and every block made it worse."""
    original, compressed = inputs(3)
    original[0], compressed[0] = original[0] * 300, compressed[0] * 300
    weight = torch.randn(9, 24, generator=torch.Generator().manual_seed(4))
    found = corrected(weight, [(original, compressed)], 0.1)
    wanted = original[0] @ weight.T
    before = (compressed[0] @ weight.T - wanted).norm()
    after = (compressed[0] @ found.T - wanted).norm()
    assert after < 0.2 * before


def test_weights_stay_where_the_hessian_cannot_be_factored() -> None:
    weight, hopeless = torch.ones(2, 4), torch.full((3, 4), float("nan"))
    assert torch.equal(corrected(weight, [(hopeless, hopeless)], 0.1), weight)
