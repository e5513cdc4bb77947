"""Tiny compressed bases that the real engine serves, with adapters of every kind."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from spallm_serve.adapted import apply_adapter
from spallm_serve.adapter import Adapter, LoraConfig, LutConfig, SmtConfig
from spallm_serve.adapter_files import read_adapter, write_adapter
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.identity import base_identity
from spallm_serve.layers import SketchedLinear
from spallm_serve.models import is_norm, load_model
from tests.tiny_models import save_random, save_tokenizer

# The engine's attention wants heads of 32 channels or more.
_SIZES = {
    "vocab_size": 131, "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    # Its columns can be shared out between two workers: codes are cut at multiples of 8.
    "llama-even": LlamaConfig(**_SIZES | {"intermediate_size": 112}, attention_bias=True),
    "llama-tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SIZES),
    "gemma3": Gemma3TextConfig(
        **_SIZES,
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": MistralConfig(**_SIZES, sliding_window=16),
}
KINDS = ("lut", "lut-rows", "lut-norms", "smt", "lora")


def make_base(
    name: str, directory: Path, *, dtype: torch.dtype = torch.float32, **settings: object
) -> Path:
    """A random model with a tokenizer, compressed.

    Args:
        name: of :data:`CONFIGS`.
        directory: for the model and what it becomes.
        dtype: of the model.
        settings: the compressor's.
    """
    dense = make_dense(name, directory / "dense", dtype)
    told = {"bits": 3, "samples": 2, "seqlen": 16, "estimator_rank": 2} | settings
    base = directory / "base"
    compress(str(dense), base, CompressSettings.model_validate(told), SilentObserver())
    return base


def make_dense(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model with a tokenizer."""
    return save_tokenizer(save_random(CONFIGS[name], directory, scale=0.15, dtype=dtype))


def make_adapter(base: Path, kind: str, seed: int, directory: Path) -> Path:
    """An adapter with random values that change the answers a lot.

    Args:
        base: see :func:`make_base`.
        kind: of :data:`KINDS`.
        seed: of the values.
        directory: where it goes.
    """
    model = load_model(base)
    digest = base_identity(model)
    generator = torch.Generator().manual_seed(seed)
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, SketchedLinear)
    }
    chosen = dict(list(linears.items())[seed % 2 :: 2])
    if kind.startswith("lut"):
        tensors = _tables(chosen, kind, generator)
        if kind == "lut-norms":
            tensors |= _norms(model, generator)
        adapter = Adapter(LutConfig(base_digest=digest), tensors)
    elif kind == "smt":
        adapter = Adapter(SmtConfig(base_digest=digest, block_size=8), _blocks(chosen, generator))
    else:
        fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
        config = LoraConfig(base_digest=digest, r=4, lora_alpha=8, fields=fields)
        adapter = Adapter(config, _lora(chosen, generator))
    write_adapter(adapter, directory)
    return directory


def _tables(
    linears: dict[str, SketchedLinear], kind: str, generator: torch.Generator
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, linear in linears.items():
        noise = 1 + 0.5 * torch.randn(linear.tables.shape, generator=generator)
        tables = (linear.tables * noise).half()
        if kind == "lut-rows":
            rows = torch.arange(1, len(tables), 3, dtype=torch.int32)
            tensors[f"{name}.rows"] = rows
            tables = tables[rows.long()]
        tensors[f"{name}.tables"] = tables
    return tensors


def _norms(model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        f"{name}.weight": module.weight.detach().float()
        + 0.5 * torch.randn(module.weight.shape, generator=generator)
        for name, module in model.named_modules()
        if is_norm(module)
    }


def _blocks(linears: dict[str, SketchedLinear], generator: torch.Generator) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, linear in linears.items():
        rows, columns = linear.out_features // 8, linear.in_features // 8
        index = torch.tensor([(0, 0), (rows - 1, columns - 1), (1, 0)], dtype=torch.int32)
        tensors[f"{name}.block_index"] = index
        tensors[f"{name}.blocks"] = (0.3 * torch.randn(3, 8, 8, generator=generator)).half()
    return tensors


def _lora(linears: dict[str, SketchedLinear], generator: torch.Generator) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, linear in linears.items():
        prefix = f"base_model.model.{name}"
        a = torch.randn(4, linear.in_features, generator=generator)
        b = torch.randn(linear.out_features, 4, generator=generator)
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = 0.1 * a, 0.1 * b
    return tensors


def oracle(base: Path, adapter: Path | None) -> PreTrainedModel:
    """What transformers makes of the same base and adapter."""
    model = load_model(base)
    if adapter is not None:
        apply_adapter(model, read_adapter(adapter))
    return model.eval()


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """The tokens that follow, the likeliest one each time."""
    ids = torch.tensor([prompt])
    found = model.generate(  # type: ignore[operator]
        ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer


@torch.no_grad()
def shortfall(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """By how much the logit of an answer's token falls short of the likeliest one's at most."""
    ids = torch.tensor([prompt + answer])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.amax(1) - chosen).max())
