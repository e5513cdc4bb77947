"""Blocks as an adapter that stock PEFT loads, of its type SUPERTUNING."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spallm_serve.adapter import BLOCK_INDEX, BLOCKS, LORA_PREFIX, Adapter, SmtConfig, expect_kind
from spallm_serve.adapter_files import CONFIG_FILE, TENSOR_FILE
from spallm_serve.errors import UserError
from spallm_serve.layers import weight_shape
from spallm_serve.trainer.smt.layers import check_block_index


def export_supertuning(adapter: Adapter, model: nn.Module, directory: Path) -> None:
    """Write blocks as a PEFT adapter that computes the same on the same dense base.

    PEFT keeps single entries of a weight: flat int32 positions and float32 values. It takes the
    same share of every weight, so all are filled up to that of the densest, with entries of value
    zero.

    Args:
        adapter: of kind SPALLM_SMT.
        model: a dense model with the base's layers; only their shapes are looked at, so one on the
            meta device will do.
        directory: gets ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        UserError: another kind of adapter, a layer that is not ``nn.Linear`` (PEFT adapts no other
            here), blocks the layer does not have, or a directory that cannot be written.
    """
    config = expect_kind(adapter, SmtConfig, "cannot be exported to SUPERTUNING")
    modules = dict(model.named_modules())
    entries: dict[str, tuple[Tensor, Tensor]] = {}
    sizes: dict[str, int] = {}
    for name in adapter.modules(BLOCKS):
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "no such layer" if linear is None else type(linear).__name__
            raise UserError(f"{name}: PEFT's SUPERTUNING adapts nn.Linear only, here is {found}")
        index = adapter.tensors[name + BLOCK_INDEX]
        check_block_index(index, linear, config.block_size, name + BLOCK_INDEX)
        shape = weight_shape(linear)
        entries[name] = _entries(adapter.tensors[name + BLOCKS], index, shape)
        sizes[name] = shape[0] * shape[1]
    # Half an entry more, so that the rounding of this number never costs a whole one.
    density = max((len(values) + 0.5) / sizes[name] for name, (_, values) in entries.items())
    sparsity = max(0.0, 1 - density)
    tensors: dict[str, Tensor] = {}
    for name, (positions, values) in entries.items():
        count = int(sizes[name] * (1 - sparsity))  # as PEFT computes it
        positions, values = _filled(positions, values, count)
        tensors[f"{LORA_PREFIX}{name}.supertuning_indices"] = positions
        tensors[f"{LORA_PREFIX}{name}.supertuning_values"] = values
    _write(directory, tensors, sparsity, sorted(entries), config.base_model_name_or_path)


def _entries(blocks: Tensor, index: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Flat positions int32 and values float32 of all entries of the blocks inside the weight."""
    size = blocks.shape[1]
    within = torch.arange(size)
    rows = (index[:, 0, None].long() * size + within)[:, :, None].expand(-1, size, size)
    columns = (index[:, 1, None].long() * size + within)[:, None, :].expand(-1, size, size)
    inside = (rows < shape[0]) & (columns < shape[1])
    positions = rows * shape[1] + columns
    return positions[inside].int(), blocks.cpu()[inside].float()


def _filled(positions: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As many entries as asked for: the rest are zeros at the first free positions."""
    free = torch.ones(count, dtype=torch.bool)
    free[positions[positions < count].long()] = False
    more = free.nonzero()[: count - len(positions), 0].int()
    return torch.cat([positions, more]), torch.cat([values, values.new_zeros(len(more))])


def _write(
    directory: Path, tensors: dict[str, Tensor], sparsity: float, modules: list[str], base: str
) -> None:
    fields = {
        "peft_type": "SUPERTUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": modules,
        "sparsity": sparsity,
        "save_precomputed_indices": True,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Without its configuration the directory is no adapter; so that goes first and comes last.
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        save_file(tensors, directory / TENSOR_FILE, metadata={"format": "pt"})
        (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"{directory}: the adapter cannot be written ({error})") from error
