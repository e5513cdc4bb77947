"""MLPs that make their inner products again in the backward pass."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.benchmarks.training import kept_bytes
from spallm_serve.models import load_model
from spallm_serve.trainer.gated_mlp import recompute_gated_products
from spallm_serve.trainer.lut.method import Lut, LutSettings
from spallm_serve.trainer.model import freeze, prepare_codes
from tests.tiny_models import save_tiny

IDS = torch.arange(3, 67).view(2, 32)


def trained(base: Path) -> PreTrainedModel:
    model = load_model(base)
    freeze(model)
    prepare_codes(model, torch.float32)
    Lut(LutSettings()).prepare(model, {})
    return model


def loss(model: PreTrainedModel) -> Tensor:
    total: Tensor = model(input_ids=IDS, labels=IDS).loss
    return total


def table_gradients(model: nn.Module) -> list[Tensor]:
    return [each.grad.clone() for each in model.parameters() if each.grad is not None]


def test_two_inner_tensors_of_each_mlp_are_not_kept(sketched_base: Path) -> None:
    model = trained(sketched_base)
    before = kept_bytes(lambda: loss(model).backward(), model)
    assert recompute_gated_products(model, torch.float32) == model.config.num_hidden_layers
    after = kept_bytes(lambda: loss(model).backward(), model)
    inner = model.config.num_hidden_layers * IDS.numel() * model.config.intermediate_size * 4
    assert before - after == 2 * inner


def test_a_graph_is_walked_twice(sketched_base: Path) -> None:
    model = trained(sketched_base)
    recompute_gated_products(model, torch.float32)
    total = loss(model)
    total.backward(retain_graph=True)
    once = table_gradients(model)
    total.backward()
    for first, both in zip(once, table_gradients(model), strict=True):
        torch.testing.assert_close(both, 2 * first)


def test_only_what_is_a_gated_product_is_touched(tmp_path: Path, sketched_base: Path) -> None:
    gpt = load_model(save_tiny("gpt2", tmp_path / "gpt2"))
    assert recompute_gated_products(gpt, torch.float32) == 0

    class Other(nn.Module):
        """The right names around another sum."""

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            for part in ("gate_proj", "up_proj", "down_proj", "act_fn"):
                setattr(self, part, getattr(mlp, part))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
            return y

    model = trained(sketched_base)
    first = model.model.layers[0]
    first.mlp = Other(first.mlp)
    assert recompute_gated_products(model, torch.float32) == model.config.num_hidden_layers - 1


def test_generation_does_without(sketched_base: Path) -> None:
    model = trained(sketched_base)
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        assert recompute_gated_products(model, torch.float32) == model.config.num_hidden_layers
        assert torch.equal(model(input_ids=IDS).logits, wanted)
