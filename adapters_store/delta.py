"""What blocks or a LoRA add to a weight, as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.adapter import (
    BLOCK_INDEX,
    BLOCKS,
    LORA_A,
    LORA_B,
    LORA_PREFIX,
    Adapter,
    LoraConfig,
    SmtConfig,
)


def changed_modules(adapter: Adapter) -> list[str]:
    """Names, in the model, of the linears that blocks or a LoRA add to."""
    if isinstance(adapter.config, SmtConfig):
        return adapter.modules(BLOCKS)
    return [name.removeprefix(LORA_PREFIX) for name in adapter.modules(LORA_A)]


def block_delta(blocks: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Blocks ``[m, l, l]`` at ``index [m, 2]``, zeros elsewhere: float32 of ``shape``."""
    size = blocks.shape[1]
    rows, columns = (-(-length // size) for length in shape)
    grid = torch.zeros(rows, columns, size, size)
    grid[index[:, 0].long(), index[:, 1].long()] = blocks.float()
    whole = grid.transpose(1, 2).reshape(rows * size, columns * size)
    return whole[: shape[0], : shape[1]]


def lora_delta(adapter: Adapter, config: LoraConfig, module: str) -> Tensor:
    """``scale B A`` of a module by its name in the model: float32 ``[out, in]``."""
    a = adapter.tensors[LORA_PREFIX + module + LORA_A]
    b = adapter.tensors[LORA_PREFIX + module + LORA_B]
    return config.scale * (b.float() @ a.float())


def weight_delta(adapter: Adapter, module: str, shape: tuple[int, int]) -> Tensor:
    """What blocks or a LoRA add to the weight ``[out, in]`` of a module: float32 of ``shape``."""
    if isinstance(adapter.config, LoraConfig):
        return lora_delta(adapter, adapter.config, module)
    return block_delta(
        adapter.tensors[module + BLOCKS], adapter.tensors[module + BLOCK_INDEX], shape
    )
