"""Normalisations that keep their input as it came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from spallm_serve.benchmarks.training import kept_bytes
from spallm_serve.models import load_model
from spallm_serve.trainer.frozen import inputs_that_take_gradients
from spallm_serve.trainer.model import LossModel, freeze
from spallm_serve.trainer.rms_norm import keep_narrow_inputs
from tests.tiny_models import save_tiny

IDS = torch.arange(3, 67).view(2, 32)


def frozen(folder: Path, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    model = load_model(save_tiny(kind, folder / kind), dtype)
    freeze(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def passed_on(model: PreTrainedModel) -> Tensor:
    """The gradient that comes out below the first block."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    assert embedded.grad is not None
    return embedded.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "norms"), [("llama", 2), ("qwen3", 4), ("mistral", 2)])
def test_the_gradient_is_the_same_to_the_bit(
    kind: str, norms: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = frozen(tmp_path, kind, dtype)
    before = passed_on(model)
    assert keep_narrow_inputs(model, dtype) == norms * model.config.num_hidden_layers + 1
    assert torch.equal(passed_on(model), before)


def test_half_of_an_input_is_kept(tmp_path: Path) -> None:
    model = frozen(tmp_path, "llama", torch.bfloat16)

    def kept() -> int:
        with inputs_that_take_gradients(model):
            loss = LossModel(model)
            return kept_bytes(lambda: loss(input_ids=IDS, labels=IDS)["loss"].backward(), model)

    before = kept()
    keep_narrow_inputs(model, torch.bfloat16)
    norms = 2 * model.config.num_hidden_layers + 1
    assert before - kept() == 2 * norms * IDS.numel() * model.config.hidden_size


def test_those_that_are_trained_or_other_stay(tmp_path: Path) -> None:
    model = frozen(tmp_path, "llama", torch.bfloat16)
    model.model.layers[0].input_layernorm.weight.requires_grad_()
    assert keep_narrow_inputs(model, torch.bfloat16) == 2 * model.config.num_hidden_layers
    for kind in ("gemma3", "gpt2"):
        assert keep_narrow_inputs(frozen(tmp_path, kind, torch.bfloat16), torch.bfloat16) == 0
    assert keep_narrow_inputs(frozen(tmp_path, "mistral", torch.float32), torch.float32) == 0


def test_a_norm_that_is_given_a_gate_stays() -> None:
    """Its forward pass takes a second tensor, in Bamba and Qwen3-Next for two."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return LlamaRMSNorm.forward(self, x if gate is None else x * gate)  # type: ignore[arg-type]

    model = nn.Sequential(Gated(), LlamaRMSNorm(8).bfloat16().requires_grad_(False))
    assert keep_narrow_inputs(model, torch.bfloat16) == 1  # type: ignore[arg-type]
