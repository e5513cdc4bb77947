"""The loss of a model's outputs, and what it keeps for the backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from spallm_serve.benchmarks.training import kept_bytes
from spallm_serve.examples import IGNORED
from spallm_serve.models import load_model
from spallm_serve.trainer.model import LossModel, freeze
from tests.tiny_models import save_tiny

IDS = torch.arange(3, 67).view(2, 32)


def embedding_gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    loss.backward()
    embedding = model.get_input_embeddings().weight
    found, embedding.grad = embedding.grad, None
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_is_that_of_the_cross_entropy(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_model(save_tiny("llama", tmp_path / "llama"), dtype)
    labels = IDS.masked_fill(torch.arange(32) < 20, IGNORED)
    found = LossModel(model)(input_ids=IDS, labels=labels, num_items_in_batch=7)["loss"]
    logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1).float()
    wanted = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / 7
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(embedding_gradient(model, found), embedding_gradient(model, wanted))


def test_without_a_loss_token_there_is_no_gradient(tmp_path: Path) -> None:
    model = load_model(save_tiny("llama", tmp_path / "llama"))
    none = torch.full_like(IDS, IGNORED)
    loss = LossModel(model)(input_ids=IDS, labels=none, num_items_in_batch=7)["loss"]
    assert loss == 0
    assert not embedding_gradient(model, loss).any()


def test_logits_are_kept_as_they_came(tmp_path: Path) -> None:
    """Their float32 copy, of which autograd would keep the logarithms, is not."""
    model = load_model(save_tiny("llama", tmp_path / "llama"), torch.bfloat16)
    freeze(model)
    model.lm_head.weight.requires_grad_()
    loss = LossModel(model)
    kept = kept_bytes(lambda: loss(input_ids=IDS, labels=IDS)["loss"].backward(), model)
    tokens = IDS.numel() - len(IDS)
    # Logits and what enters the head, in two bytes; targets, and which tokens are kept.
    wanted = 2 * tokens * (model.config.vocab_size + model.config.hidden_size) + 8 * tokens
    assert wanted <= kept <= wanted + 1024
