"""Training steps of whole tiny models against a dense float64 model with masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from spallm_serve.trainer.sparselora.layers import SparseAttention, SparseMlp
from tests.spallm_serve.trainer.sparselora_models import (
    chosen_channels,
    loss_of,
    make_batch,
    oracle,
    prepared,
    sketched,
    tiny,
)

NAMES = ["llama", "grouped", "mistral", "qwen3", "gemma3"]


def embedded(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    return found.detach().requires_grad_()


def check_against_oracle(
    dense: torch.nn.Module,
    model: torch.nn.Module,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-8,
    **settings: object,
) -> dict[str, object]:
    batch = make_batch()
    method, parameters = prepared(model, **settings)
    model.to(dtype)
    model.train()
    method.on_batch(batch, 0.5)
    inputs = embedded(model, batch)
    losses: list[Tensor] = []
    chosen = chosen_channels(model, lambda: losses.append(loss_of(model, batch, inputs)))
    losses[0].backward()

    stop = settings.get("context_attn_backward") == "stop"
    twin, own = oracle(dense, chosen, batch, parameters, scale=2.0, stop=stop)
    twin_inputs = inputs.detach().double().requires_grad_()
    wanted = loss_of(twin, batch, twin_inputs)
    wanted.backward()

    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(losses[0], wanted, **close)
    torch.testing.assert_close(inputs.grad, twin_inputs.grad, **close)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, own[name].grad, **close, msg=name)
    return chosen


def partner(model: torch.nn.Module, channel: int) -> int:
    """The key channel that a query channel is multiplied by."""
    attention = model.get_submodule("model.layers.1.self_attn")
    head = attention.head_dim
    return channel // head // attention.num_key_value_groups * head + channel % head


@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_a_dense_base(name: str) -> None:
    model = tiny(name)
    chosen = check_against_oracle(copy.deepcopy(model), model)
    assert set(chosen) == {
        "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.self_attn",
        "model.layers.2.self_attn",
    }  # fmt: skip
    attention = chosen["model.layers.1.self_attn"]
    assert isinstance(attention, dict)
    # Those that normalise queries and keys keep them dense.
    assert set(attention) >= {"v_proj"}
    assert ("q_proj" in attention) == (name not in ("qwen3", "gemma3"))
    if "q_proj" in attention:
        assert attention["q_proj"].tolist() == [
            channel
            for channel in range(
                model.model.layers[1].self_attn.q_proj.base_layer.linear.out_features
            )
            if partner(model, channel) in attention["k_proj"].tolist()
        ]


@pytest.mark.parametrize("name", ["llama", "grouped", "qwen3"])
@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 2), (4, 2)])
def test_a_step_on_a_sketched_base(name: str, bits: int, groups: int) -> None:
    dense, model = sketched(tiny(name), bits, groups)
    check_against_oracle(dense, model)


def test_a_step_on_a_sketched_base_with_the_kernels_types() -> None:
    dense, model = sketched(tiny("grouped"), 3, 2)
    check_against_oracle(dense, model, torch.float32, 2e-4)


def test_a_step_without_gradients_through_context_attention() -> None:
    model = tiny("grouped")
    check_against_oracle(copy.deepcopy(model), model, context_attn_backward="stop")


def test_a_step_with_lora_on_few_linears() -> None:
    model = tiny("grouped")
    check_against_oracle(copy.deepcopy(model), model, targets=("v_proj",))


def test_a_step_in_float32() -> None:
    model = tiny("grouped")
    check_against_oracle(copy.deepcopy(model), model, torch.float32, 2e-4)


def test_a_step_in_bfloat16_has_about_the_same_gradient() -> None:
    batch = make_batch()
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("grouped").to(dtype)
        method, parameters = prepared(model)
        model.train()
        method.on_batch(batch, 0.5)
        loss_of(model, batch).backward()
        assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters.values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def run(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


@pytest.mark.parametrize("base", ["dense", "sketched"])
def test_evaluation_is_dense(base: str) -> None:
    batch = make_batch()
    plain = tiny("grouped") if base == "dense" else sketched(tiny("grouped"), 3, 2)[1]
    sparse = copy.deepcopy(plain)
    prepared(plain, sparsity="none")
    method, _ = prepared(sparse)
    method.on_batch(batch, 0.5)
    torch.testing.assert_close(run(sparse, batch), run(plain, batch), rtol=0, atol=1e-6)
    sparse.train()
    assert not torch.allclose(run(sparse, batch), run(plain, batch), atol=1e-3)
    sparse.eval()
    torch.testing.assert_close(run(sparse, batch), run(plain, batch), rtol=0, atol=1e-6)


def test_training_is_dense_before_the_start_and_at_the_end() -> None:
    batch = make_batch()
    plain, sparse = tiny("grouped").train(), tiny("grouped").train()
    _, wanted = prepared(plain, sparsity="none")
    method, found = prepared(sparse, start=0.05, end=0.25)
    for share_done in (0.0499, 0.75, 1.0):
        method.on_batch(batch, share_done)
        for model in (plain, sparse):
            model.zero_grad()
            loss_of(model, batch).backward()
        for name, parameter in found.items():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-5, atol=1e-6)
    for share_done in (0.05, 0.7499):
        method.on_batch(batch, share_done)
        assert not torch.allclose(loss_of(sparse, batch), loss_of(plain, batch), atol=1e-4)


def test_a_batch_of_outputs_only_is_dense() -> None:
    batch = make_batch(("ooooo", "ooooo"))
    plain, sparse = tiny("grouped").train(), tiny("grouped").train()
    prepared(plain, sparsity="none")
    method, _ = prepared(sparse)
    method.on_batch(batch, 0.5)
    torch.testing.assert_close(run(sparse, batch), run(plain, batch), rtol=0, atol=1e-6)


def test_a_batch_without_outputs_is_all_sparse() -> None:
    """Sensitivity runs and evaluation of prompts have such; nothing is computed densely."""
    batch = make_batch(("......", "......"))
    model = tiny("grouped").train()
    method, _ = prepared(model)
    method.on_batch(batch, 0.5)
    assert run(model, batch).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    batch = make_batch()
    found = []
    for checkpointing in (False, True):
        model = tiny("grouped").train()
        method, parameters = prepared(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        method.on_batch(batch, 0.5)
        loss_of(model, batch, embedded(model, batch)).backward()
        found.append([parameter.grad for parameter in parameters.values()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_another_batch_than_announced_is_refused() -> None:
    model = tiny("grouped").train()
    method, _ = prepared(model)
    method.on_batch(make_batch(), 0.5)
    with pytest.raises(ValueError, match="expected the 36 tokens of the batch, got 10"):
        run(model, make_batch(("....o", "....o")))


def test_different_inputs_of_q_and_k_are_refused() -> None:
    model = tiny("grouped").train()
    method, _ = prepared(model)
    method.on_batch(make_batch(), 0.5)
    attention = model.get_submodule("model.layers.1.self_attn")
    x = torch.randn(3, 12, 24)
    attention.q_proj(x)
    with pytest.raises(RuntimeError, match="do not read the same input"):
        attention.k_proj(x.clone())


def test_the_layers_have_one_place_each() -> None:
    model = tiny("grouped")
    names = set(dict(model.named_parameters()))
    prepared(model)
    kept = [name for name in model.state_dict() if "lora" not in name]
    assert len(kept) == len(names)
    assert sum(isinstance(module, SparseMlp) for module in model.modules()) == 2
    assert sum(isinstance(module, SparseAttention) for module in model.modules()) == 2


def test_columns_are_contiguous_in_the_only_copy_of_the_weight() -> None:
    model = tiny("grouped")
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    before = down.weight.clone()
    parameter, size = down.weight, sum(p.nbytes for p in model.parameters())
    prepared(model, targets=("q_proj",))
    assert down.weight is parameter
    assert torch.equal(down.weight, before)
    assert down.weight.T.is_contiguous()
    added = sum(p.nbytes for name, p in model.named_parameters() if "lora" in name)
    assert sum(p.nbytes for p in model.parameters()) == size + added
    assert all("factors" in name or "estimators" in name or "freq" in name
               for name, _ in model.named_buffers())  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_sketch_holds_its_sliced_codes_twice(bits: int) -> None:
    _, model = sketched(tiny("grouped"), bits, 1)
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    codes = linear.codes.nbytes
    prepared(model, sparsity={"layers.0.mlp": 0.5})
    mlp = model.get_submodule("model.layers.0.mlp")
    planes = dict(mlp.named_buffers())["_down_columns.planes"]
    assert planes.shape == (bits, linear.in_features, -(-linear.out_features // 8))
    assert planes.nbytes <= codes * 1.1
