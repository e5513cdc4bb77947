"""Adapters with random values for a loaded model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spallm_serve.adapter import (
    BLOCK_INDEX,
    BLOCKS,
    LORA_A,
    LORA_B,
    LORA_PREFIX,
    ROWS,
    Adapter,
    LoraConfig,
    LutConfig,
    SmtConfig,
    parse_adapter_config,
)
from spallm_serve.adapter_files import write_adapter
from spallm_serve.checkpoint import TABLES
from spallm_serve.identity import base_identity
from spallm_serve.layers import SketchedLinear, is_linear, weight_shape
from spallm_serve.models import is_norm, load_model
from spallm_serve.trainer.smt.layers import grid_shape

RANK = 3
BLOCK = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_names(model: PreTrainedModel) -> list[str]:
    return [
        name for name, module in model.named_modules() if is_linear(module) and name != "lm_head"
    ]


def lut(model: PreTrainedModel, seed: int = 0) -> Adapter:
    """Tables of all layers but one, of every third row of another; and the norms."""
    random = generator(seed)
    tensors: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SketchedLinear)}
    for number, (name, layer) in enumerate(list(layers.items())[1:]):
        tables = layer.tables.float()
        tables = (tables + 0.05 * torch.randn(tables.shape, generator=random)).half()
        if number == 0:
            rows = torch.arange(0, len(tables), 3, dtype=torch.int32)
            tensors[name + ROWS], tables = rows, tables[rows.long()]
        tensors[name + TABLES] = tables
    for name, module in model.named_modules():
        if is_norm(module):
            for leaf, parameter in module.named_parameters(recurse=False):
                noise = 0.1 * torch.randn(parameter.shape, generator=random)
                tensors[f"{name}.{leaf}"] = parameter.detach().float() + noise
    return Adapter(LutConfig(base_digest=base_identity(model)), tensors)


def smt(model: PreTrainedModel, seed: int = 0) -> Adapter:
    """The first and the last block of every other layer; the last reach beyond ragged edges."""
    random = generator(seed)
    tensors: dict[str, Tensor] = {}
    for name in linear_names(model)[::2]:
        layer = model.get_submodule(name)
        rows, columns = grid_shape(layer, BLOCK)
        last = [rows - 1, columns - 1]
        blocks = 0.1 * torch.randn(2, BLOCK, BLOCK, generator=random)
        height, width = weight_shape(layer)
        blocks[1, height - last[0] * BLOCK :] = 0
        blocks[1, :, width - last[1] * BLOCK :] = 0
        tensors[name + BLOCKS] = blocks.half()
        tensors[name + BLOCK_INDEX] = torch.tensor([[0, 0], last], dtype=torch.int32)
    return Adapter(SmtConfig(base_digest=base_identity(model), block_size=BLOCK), tensors)


def lora(
    model: PreTrainedModel, names: list[str] | None = None, seed: int = 0, *, scale: float = 0.1
) -> Adapter:
    """On all linears of the blocks, or on some; as PEFT writes it, so without a base's digest."""
    random = generator(seed)
    tensors: dict[str, Tensor] = {}
    for name in linear_names(model) if names is None else names:
        rows, columns = weight_shape(model.get_submodule(name))
        a = torch.randn(RANK, columns, generator=random)
        tensors[LORA_PREFIX + name + LORA_A] = scale * a
        tensors[LORA_PREFIX + name + LORA_B] = torch.randn(rows, RANK, generator=random)
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "inference_mode": True}
    config = parse_adapter_config(fields, "test")
    assert isinstance(config, LoraConfig)
    return Adapter(config, tensors)


MAKERS = {"lut": lut, "smt": smt, "lora": lora}


def saved(kind: str, base: Path, directory: Path, seed: int = 0) -> Path:
    """A random adapter of a base, on disk."""
    write_adapter(MAKERS[kind](load_model(base), seed=seed), directory)
    return directory
