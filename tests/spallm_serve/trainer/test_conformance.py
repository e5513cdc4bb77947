"""What every method owes the loop, whatever it trains and on whatever base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.adapted import apply_adapter
from spallm_serve.adapter import Adapter, adapter_digest
from spallm_serve.adapter_files import read_adapter, write_adapter
from spallm_serve.errors import UserError
from spallm_serve.identity import base_identity
from spallm_serve.models import load_model
from spallm_serve.trainer.flops import block_shape, counted_flops, frozen_flops
from spallm_serve.trainer.gated_mlp import recompute_gated_products
from spallm_serve.trainer.lut.method import Lut, LutSettings
from spallm_serve.trainer.method import Method, WarmUp
from spallm_serve.trainer.model import LossModel, freeze
from spallm_serve.trainer.smt.method import Smt, SmtSettings
from spallm_serve.trainer.sparselora.method import SparseLora
from spallm_serve.trainer.sparselora.settings import SparseLoraSettings

# Of the first layer, whose inputs do not depend on what is trained: elsewhere a small step can make
# it choose other channels, and then the loss jumps.
SPARSE = {"layers.0.self_attn": 0.5}
METHODS: dict[str, Callable[[], Method]] = {
    "lut": lambda: Lut(LutSettings()),
    "lut-rows-norms": lambda: Lut(LutSettings(rows=0.3, norms=True, warm_up_batches=2)),
    "smt": lambda: Smt(SmtSettings(block_size=8, blocks=7, warm_up_batches=2)),
    "smt-mlp": lambda: Smt(
        SmtSettings(
            block_size=16, share=0.2, modules=("up_proj", "down_proj"), selection="per_kind"
        )
    ),
    "lora": lambda: SparseLora(SparseLoraSettings(rank=3, sparsity="none")),
    "sparselora": lambda: SparseLora(SparseLoraSettings(rank=3, sparsity=SPARSE)),
}
CASES = [
    (method, base)
    for method in METHODS
    for base in ("dense", "sketched")
    if base == "sketched" or not method.startswith("lut")
]
cases = pytest.mark.parametrize(("name", "kind"), CASES)


@pytest.fixture
def base(kind: str, dense_base: Path, sketched_base: Path) -> Path:
    return dense_base if kind == "dense" else sketched_base


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Two rows of which the second half is learnt."""
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def prepared(method: Method, base: Path) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    model = load_model(base)
    freeze(model)
    loss = LossModel(model)
    warm_up = WarmUp(
        (batch(seed) for seed in range(method.warm_up_batches)), lambda each: loss(**each)["loss"]
    )
    return model, method.prepare(model, method.select(model, warm_up))


def logits(model: PreTrainedModel) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=batch()["input_ids"]).logits
    return found


def disturb(trained: dict[str, nn.Parameter]) -> None:
    """Change all that is trained, to values that a file keeps as they are."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + 0.05 * noise).half())


@cases
def test_nothing_changes_before_the_first_step(name: str, base: Path) -> None:
    model, trained = prepared(METHODS[name](), base)
    assert torch.equal(logits(model), logits(load_model(base)))
    assert trained
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    asking = {id(value) for value in model.parameters() if value.requires_grad}
    assert asking == {id(parameter) for parameter in trained.values()}


@cases
def test_gradients_are_the_slope_of_the_loss(name: str, base: Path) -> None:
    """Along random directions, by central differences."""
    method = METHODS[name]()
    model, trained = prepared(method, base)
    disturb(trained)
    model.train()
    loss = LossModel(model)

    def value() -> Tensor:
        method.on_batch(batch(), 0.5)
        found: Tensor = loss(**batch())["loss"]
        return found

    value().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        directions = {
            key: torch.randn(parameter.shape, generator=generator)
            for key, parameter in trained.items()
        }
        slope = sum(
            float((parameter.grad.double() * directions[key]).sum())
            for key, parameter in trained.items()
        )
        step, ends = 5e-5, []
        with torch.no_grad():
            for sign in (1, -2):
                for key, parameter in trained.items():
                    parameter.add_(sign * step * directions[key])
                ends.append(float(value()))
            for key, parameter in trained.items():
                parameter.add_(step * directions[key])
        size = sum(float(direction.square().sum()) for direction in directions.values()) ** 0.5
        length = sum(float(p.grad.square().sum()) for p in trained.values()) ** 0.5
        measured = (ends[0] - ends[1]) / (2 * step)
        # A random direction meets a share of about 1 / sqrt(n) of the gradient.
        scale = length * size / sum(p.numel() for p in trained.values()) ** 0.5
        assert measured == pytest.approx(slope, abs=0.03 * scale)


@cases
def test_what_is_written_computes_what_was_trained(name: str, base: Path, tmp_path: Path) -> None:
    method = METHODS[name]()
    model, trained = prepared(method, base)
    disturb(trained)
    other = load_model(base)
    adapter = method.adapter(base_identity(other), "some/base")
    write_adapter(adapter, tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter", base_identity(other))
    assert adapter_digest(found) == adapter_digest(adapter)
    before = logits(other)
    apply_adapter(other, found)
    assert not torch.allclose(logits(other), before, atol=1e-3)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)


@cases
def test_another_base_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    method = METHODS[name]()
    prepared(method, base)
    adapter: Adapter = method.adapter("ab" * 32, "")
    write_adapter(adapter, tmp_path / "adapter")
    model = load_model(base)
    before = logits(model)
    with pytest.raises(UserError, match="ab" * 32):
        read_adapter(tmp_path / "adapter", base_identity(model))
    with pytest.raises(UserError, match="ab" * 32):
        apply_adapter(model, adapter)
    assert torch.equal(logits(model), before)


@cases
def test_choosing_leaves_the_model_as_it_was(name: str, base: Path) -> None:
    method = METHODS[name]()
    model = load_model(base)
    freeze(model)
    modules = {key: id(module) for key, module in model.named_modules()}
    loss = LossModel(model)
    method.select(
        model,
        WarmUp(iter([batch(), batch(1)]), lambda each: loss(**each)["loss"]),
    )
    assert {key: id(module) for key, module in model.named_modules()} == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits(model), logits(load_model(base)))


@cases
def test_the_flop_counter_equals_the_formula(name: str, base: Path) -> None:
    method = METHODS[name]()
    shape = block_shape(load_model(base))
    model, trained = prepared(method, base)
    model.train()
    model.set_attn_implementation("sdpa")  # whose operations are not counted on a CPU
    given = batch()
    method.on_batch(given, 0.5)
    loss = LossModel(model)
    counted = counted_flops(lambda: loss(**given)["loss"].backward())
    assert shape is not None
    config = model.config
    frozen = frozen_flops(shape, config.num_hidden_layers, trained, given, config.vocab_size)
    assert counted == pytest.approx(frozen + method.added_flops(given), rel=0.03)


@cases
def test_products_made_again_change_no_bit(name: str, base: Path) -> None:
    """The loss and gradients that autograd finds with all four inner tensors kept."""
    kept = gradients(METHODS[name](), base, again=False)
    made_again = gradients(METHODS[name](), base, again=True)
    assert kept.keys() == made_again.keys()
    for parameter, value in kept.items():
        assert torch.equal(value, made_again[parameter]), parameter


def gradients(method: Method, base: Path, *, again: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, trained = prepared(method, base)
    disturb(trained)
    if again:
        assert recompute_gated_products(model, torch.float32) == model.config.num_hidden_layers
    model.train()
    method.on_batch(batch(), share_done=0.5)
    loss = LossModel(model)(**batch())["loss"]
    loss.backward()
    found = {key: parameter.grad for key, parameter in trained.items()}
    return {"loss": loss.detach()} | {k: grad for k, grad in found.items() if grad is not None}
