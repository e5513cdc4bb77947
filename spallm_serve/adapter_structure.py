"""Whether an adapter is one by itself, without its base: all tensors that belong, and no other."""

from __future__ import annotations

import torch
from torch import Tensor

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
)
from spallm_serve.checkpoint import TABLES
from spallm_serve.errors import UserError
from spallm_serve.kernels.packing import SUPPORTED_BITS

_TRAINED_IN = (torch.float16, torch.bfloat16, torch.float32)


def check_structure(adapter: Adapter) -> None:
    """Refuse an adapter that does not hold exactly what its kind needs, in the format's dtypes.

    Raises:
        UserError: names the tensor, what it is and what was expected.
    """
    if isinstance(adapter.config, LutConfig):
        _check_lut(adapter)
    elif isinstance(adapter.config, SmtConfig):
        _check_smt(adapter, adapter.config)
    else:
        _check_lora(adapter, adapter.config)


def _check_lut(adapter: Adapter) -> None:
    tables = set(adapter.modules(TABLES))
    orphans = set(adapter.modules(ROWS)) - tables
    if orphans:
        raise UserError(f"{min(orphans)}{ROWS}: there are no tables for these rows")
    for name, tensor in adapter.tensors.items():
        if name.endswith(TABLES):
            _expect(name, tensor, torch.float16, 3)
            entries = tensor.shape[2]
            if entries not in [1 << bits for bits in SUPPORTED_BITS]:
                raise UserError(f"{name}: has {entries} entries, expected 4, 8 or 16")
        elif name.endswith(ROWS):
            _expect(name, tensor, torch.int32, 1)
            height = len(adapter.tensors[name.removesuffix(ROWS) + TABLES])
            if len(tensor) != height:
                raise UserError(f"{name}: {len(tensor)} rows for {height} tables")
            if int(tensor[0]) < 0 or not bool((tensor[1:] > tensor[:-1]).all()):
                raise UserError(f"{name}: expected row numbers in ascending order")
        elif name.endswith((".weight", ".bias")):
            _expect(name, tensor, torch.float32, 1)
        else:
            raise UserError(f"{name}: neither tables, nor rows, nor part of a normalisation")


def _check_smt(adapter: Adapter, config: SmtConfig) -> None:
    _check_pairs(adapter, BLOCKS, BLOCK_INDEX)
    for module in adapter.modules(BLOCKS):
        blocks, index = adapter.tensors[module + BLOCKS], adapter.tensors[module + BLOCK_INDEX]
        _expect(module + BLOCKS, blocks, torch.float16, 3)
        _expect(module + BLOCK_INDEX, index, torch.int32, 2)
        size = config.block_size
        if list(blocks.shape) != [len(index), size, size] or index.shape[1] != 2:
            raise UserError(
                f"{module}: {list(blocks.shape)} blocks and {list(index.shape)} positions do not "
                f"go together, or with the block size {size}"
            )
        places = {(row, column) for row, column in index.tolist()}
        if len(places) != len(index) or int(index.min()) < 0:
            raise UserError(f"{module}{BLOCK_INDEX}: a block is given twice, or is outside")


def _check_lora(adapter: Adapter, config: LoraConfig) -> None:
    _check_pairs(adapter, LORA_A, LORA_B)
    for module in adapter.modules(LORA_A):
        if not module.startswith(LORA_PREFIX):
            raise UserError(f"{module}: expected a name that starts with {LORA_PREFIX}")
        a, b = adapter.tensors[module + LORA_A], adapter.tensors[module + LORA_B]
        for tensor in (a, b):
            _expect(module, tensor, None, 2)
        if len(a) != config.r or b.shape[1] != config.r:
            raise UserError(
                f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not of rank "
                f"{config.r}"
            )


def _check_pairs(adapter: Adapter, first: str, second: str) -> None:
    odd = [name for name in adapter.tensors if not name.endswith((first, second))]
    if odd:
        raise UserError(f"{odd[0]}: neither {first} nor {second}")
    lonely = set(adapter.modules(first)) ^ set(adapter.modules(second))
    if lonely:
        raise UserError(f"{min(lonely)}: needs both {first} and {second}")


def _expect(name: str, tensor: Tensor, dtype: torch.dtype | None, dimensions: int) -> None:
    """Of this many dimensions, none of them zero; None stands for what LoRAs are trained in."""
    right = tensor.dtype in _TRAINED_IN if dtype is None else tensor.dtype == dtype
    if not right or tensor.dim() != dimensions or not tensor.numel():
        names = _TRAINED_IN if dtype is None else (dtype,)
        wanted = " or ".join(str(each).removeprefix("torch.") for each in names)
        found = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{name}: expected {wanted} of {dimensions} dimensions, got {found} "
            f"{list(tensor.shape)}"
        )
