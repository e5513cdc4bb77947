"""Weights kept in bfloat16: how near products come to float64, and what they do not depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spallm_serve.kernels.choice import FORCE_VARIABLE, keeps_bfloat16
from spallm_serve.kernels.cpu import dense
from spallm_serve.kernels.cpu.backend import INVARIANT_VARIABLE
from spallm_serve.kernels.cpu.dense import dense_linear
from spallm_serve.kernels.cpu.library import LEVELS, best_level

native = pytest.mark.skipif(
    not keeps_bfloat16("cpu", torch.float32, torch.bfloat16), reason="no compiled kernels"
)


def random(tokens: int, rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    return x, torch.randn(rows, columns, generator=generator).bfloat16()


@native
@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(range(len(LEVELS))),
    st.integers(1, 70),
    st.integers(1, 50),
    st.integers(1, 200),
    st.integers(0, 10**6),
)
def test_products_are_those_of_the_same_weight_in_float64(
    level: int, tokens: int, rows: int, columns: int, seed: int
) -> None:
    x, weight = random(tokens, rows, columns, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "best_level", lambda: min(level, best_level()))
        y = dense_linear(x, weight)
    assert y.dtype == torch.float32
    expected = x.double() @ weight.double().T
    bound = 1e-6 * (x.double().abs() @ weight.double().abs().T) * max(1, columns / 50)
    assert ((y.double() - expected).abs() <= bound).all()


@native
@pytest.mark.parametrize("level", range(len(LEVELS)))
@pytest.mark.parametrize("columns", [5, 64, 150, 577])
def test_a_token_has_the_same_product_whatever_others_there_are(
    columns: int, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "best_level", lambda: min(level, best_level()))
    monkeypatch.setenv(INVARIANT_VARIABLE, "1")
    x, weight = random(67, 40, columns, 0)
    together = dense_linear(x, weight)
    for token in range(67):
        assert torch.equal(dense_linear(x[token : token + 1], weight)[0], together[token])


@native
def test_a_long_run_of_tokens_is_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_PART_WEIGHTS", 7 * 150)
    x, weight = random(100, 40, 150, 0)
    torch.testing.assert_close(dense_linear(x, weight), x @ weight.float().T, rtol=1e-5, atol=1e-4)


@native
def test_what_does_not_belong_together_is_refused() -> None:
    x, weight = random(3, 8, 16, 0)
    with pytest.raises(ValueError, match="x: expected float32"):
        dense_linear(x.bfloat16(), weight)
    with pytest.raises(ValueError, match="weight: expected bfloat16"):
        dense_linear(x, weight.float())
    with pytest.raises(ValueError, match=r"weight: expected bfloat16 \[out, 15\]"):
        dense_linear(x[:, :15], weight)
    with pytest.raises(ValueError, match="contiguous"):
        dense_linear(x[:, ::2], weight[:, ::2])


@native
def test_only_bfloat16_beside_float32_on_a_cpu_with_kernels_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not keeps_bfloat16("cpu", torch.bfloat16, torch.bfloat16)
    assert not keeps_bfloat16("cpu", torch.float32, torch.float16)
    assert not keeps_bfloat16("cuda", torch.float32, torch.bfloat16)
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert not keeps_bfloat16("cpu", torch.float32, torch.bfloat16)
