"""Tiny random models of real architectures, widths on purpose no multiple of 8 or 128."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

_COMMON = {
    "vocab_size": 131,
    "hidden_size": 36,
    "intermediate_size": 58,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WITHOUT_GROUPS = {
    key: value for key, value in _COMMON.items() if key not in ("num_key_value_heads", "head_dim")
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_COMMON),
    "gemma3": Gemma3TextConfig(
        **_COMMON,
        query_pre_attn_scalar=12,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": MistralConfig(**_COMMON, sliding_window=8),
    "phi": PhiConfig(**_WITHOUT_GROUPS, partial_rotary_factor=0.5),
    "gpt2": GPT2Config(
        vocab_size=131, n_embd=36, n_layer=3, n_head=3, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": OPTConfig(
        vocab_size=131, hidden_size=36, ffn_dim=58, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=64, word_embed_proj_dim=36,
    ),
}  # fmt: skip


def save_tiny(name: str, directory: Path, *, shard_size: str = "50GB") -> Path:
    """A random model of one of :data:`CONFIGS`."""
    return save_random(CONFIGS[name], directory, shard_size=shard_size)


def save_random(
    config: PreTrainedConfig,
    directory: Path,
    *,
    scale: float = 0.2,
    shard_size: str = "50GB",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random model; biases and norms are random too.

    Args:
        config: of it.
        directory: where it goes.
        scale: standard deviation of the weights.
        shard_size: as transformers writes it.
        dtype: of what is saved.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * scale)
    model.tie_weights()
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    return directory


_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_CHARACTERS = ("\n", *map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def save_tokenizer(
    directory: Path,
    *,
    merges: tuple[tuple[str, str], ...] = (),
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """A tokenizer of single ASCII characters for the models above.

    Args:
        directory: the model's.
        merges: pairs that become one token, in order; they may span a space.
        chat_template: None for a tokenizer without.
    """
    tokens = (*_SPECIAL, *_CHARACTERS, *(first + second for first, second in merges))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )
    fast.save_pretrained(directory)
    return directory
