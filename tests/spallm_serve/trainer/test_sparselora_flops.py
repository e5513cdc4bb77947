"""Operations by formula against torch's counter, and against the paper's figures."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from spallm_serve.trainer.flops import BlockShape, block_shape, counted_flops
from spallm_serve.trainer.sparselora.flops import base_flops, lora_flops, predicted_share
from spallm_serve.trainer.sparselora.plan import SparsityPlan, resolve_plan
from spallm_serve.trainer.sparselora.savings import predict_savings
from spallm_serve.trainer.sparselora.settings import SparseLoraSettings
from spallm_serve.trainer.sparselora.tokens import SCORED_TOKENS, context_share, split_batch
from tests.spallm_serve.trainer.sparselora_models import loss_of, make_batch, prepared, sketched

LLAMA3_8B = BlockShape(4096, 4096, 1024, 14336)
LLAMA2_7B = BlockShape(4096, 4096, 4096, 11008)
ROWS = ("." * 70 + "o" * 26, "_" * 30 + "." * 50 + "o" * 16)


@pytest.mark.parametrize(
    ("shape", "preset", "context", "share"),
    [
        (LLAMA3_8B, "o1", 509 / 512, 0.664),  # CSR170K, table 1 says 0.65
        (LLAMA3_8B, "o2", 384 / 512, 0.457),  # Math10K, table 9 says 0.46
    ],
)
def test_the_papers_figures(shape: BlockShape, preset: str, context: float, share: float) -> None:
    plan = resolve_plan(SparseLoraSettings.model_validate({"sparsity": preset}), 32)
    assert predicted_share(shape, plan, context, 0.05) == pytest.approx(share, abs=0.002)


def test_a_dense_block_by_the_designs_formula() -> None:
    hidden, values, inner = 4096, 1024, 14336
    wanted = 2 * (2 * hidden * (2 * hidden + 2 * values) + 6 * hidden * inner)
    assert base_flops(LLAMA3_8B) == wanted


@pytest.mark.parametrize("dense_queries", [False, True])
def test_a_sparse_block(dense_queries: bool) -> None:
    shape = BlockShape(100, 200, 100, 1000, dense_queries)
    found = base_flops(shape, 0.9, 0.5)
    query_and_key = 2 * 100 * 300 * (1 if dense_queries else 0.5)
    assert found == 2 * (query_and_key + 2 * 100 * 300 * 0.5 + 6 * 100 * 100)


def model_of(kind: str) -> PreTrainedModel:
    sizes = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    config = LlamaConfig(**sizes) if kind != "qwen3" else Qwen3Config(**sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False)
    if kind == "sketched":
        _, model = sketched(model, 3, 2)
    # With gradients to the embeddings, as under gradient checkpointing, every layer is as another.
    model.enable_input_require_grads()
    return model.train()


SPARSE = {
    "layers.0.mlp": 0.5, "layers.1.mlp": 0.9, "layers.1.self_attn": 0.5, "layers.2.self_attn": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen3", "sketched"])
@pytest.mark.parametrize("sparse", [False, True])
def test_formula_and_counter_agree(kind: str, sparse: bool) -> None:
    batch = make_batch(ROWS)
    model = model_of(kind)
    shape = block_shape(model)
    assert shape is not None
    assert shape.dense_queries == (kind == "qwen3")
    settings = {"sparsity": SPARSE if sparse else "none", "rank": 4, "estimator_rank": 2}
    method, parameters = prepared(model, **settings, start=0.0, end=0.0)
    method.on_batch(batch, 0.5)
    counted = counted_flops(lambda: loss_of(model, batch).backward())

    tokens, length = batch["labels"].numel(), batch["labels"].shape[1]
    plan = resolve_plan(SparseLoraSettings.model_validate(settings), 3)
    context = context_share(batch["labels"]) * tokens
    blocks = 3 * base_flops(shape) * (tokens - context) + context * sum(
        base_flops(shape, *pair) for pair in zip(plan.mlp, plan.self_attn, strict=True)
    )
    loras = lora_flops(sum(parameter.numel() for parameter in parameters.values())) * tokens
    attention = 3 * 12 * length * 48 * tokens  # two products, and two gradients of each
    head = 4 * 48 * 61 * tokens
    assert counted == pytest.approx(
        blocks + loras + attention + head + estimators(batch, shape, plan), rel=0.03
    )
    assert method.savings(context / tokens).flops == pytest.approx(
        (blocks + loras) / (3 * base_flops(shape) * tokens + loras) if sparse else 1, rel=0.03
    )


def estimators(batch: dict[str, torch.Tensor], shape: BlockShape, plan: SparsityPlan) -> float:
    """Forward only, for the tokens looked at, of rank 2."""
    split = split_batch(batch)
    assert split is not None
    outputs = [shape.values] if shape.dense_queries else [shape.values, shape.values, shape.queries]
    per_token = 0
    for mlp, attention in zip(plan.mlp, plan.self_attn, strict=True):
        widths = [shape.inner, shape.inner] * (mlp > 0) + outputs * (attention > 0)
        per_token += sum(2 * 2 * (shape.hidden + width) for width in widths)
    return per_token * len(split.scored)


def test_estimators_take_less_than_a_hundredth() -> None:
    """Of a step of 1024 tokens, in a model as narrow as SmolLM2-135M, at rank 8."""
    hidden, inner, values = 576, 1536, 192
    per_token = 16 * (5 * hidden + 2 * inner + 2 * values + hidden)
    assert SCORED_TOKENS * per_token < 0.01 * 1024 * base_flops(
        BlockShape(hidden, hidden, values, inner), 0.97, 0.2
    )


def test_shape_of_other_architectures() -> None:
    from tests.spallm_serve.trainer.sparselora_models import tiny

    assert block_shape(tiny("gpt2")) is None
    assert block_shape(tiny("llama")) == BlockShape(36, 36, 12, 58)


def savings(shape: BlockShape, sparsity: object, context: float) -> tuple[float, str]:
    plan = resolve_plan(SparseLoraSettings.model_validate({"sparsity": sparsity}), 32)
    found = predict_savings(shape, plan, context, 0.05, 10**6)
    return found.flops, found.why


def test_savings_that_pay() -> None:
    flops, why = savings(LLAMA2_7B, "o1", 0.8)
    assert flops == pytest.approx(0.77, abs=0.02)
    assert "80% of the tokens are context, 14 of 32 MLPs and 11 of 32 attentions sparse" in why
    assert "cannot" not in why


def test_savings_that_cannot_pay() -> None:
    flops, why = savings(LLAMA2_7B, "o1", 0.1)
    assert flops > 0.95
    assert why.startswith("cannot pay, use plain LoRA: ")
    assert "only 10% of the tokens are context" in why
    flops, why = savings(LLAMA2_7B, {"layers.4.self_attn": 0.2}, 0.9)
    assert flops > 0.95
    assert "too little is sparse (0 of 32 MLPs and 1 of 32 attentions sparse)" in why


def test_savings_of_narrow_blocks() -> None:
    flops, why = savings(BlockShape(128, 128, 128, 344), "o2", 0.9)
    assert flops < 0.95
    assert why.startswith("cannot pay, use plain LoRA: ")
    assert "a width of 128 is too small" in why


def test_savings_of_nothing_sparse() -> None:
    assert savings(LLAMA2_7B, "none", 0.9) == (1.0, "no layer is sparse: this is plain LoRA")


def test_models_stay_apart() -> None:
    """Two models in one process know nothing of each other's batches."""
    first, second = model_of("llama"), model_of("llama")
    batch = make_batch(ROWS)
    one, _ = prepared(first)
    prepared(second)
    plain = copy.deepcopy(second)
    one.on_batch(batch, 0.5)
    assert torch.equal(loss_of(second, batch), loss_of(plain, batch))
