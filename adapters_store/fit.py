"""Whether an adapter is of a base: every tensor against the manifest."""

from __future__ import annotations

from spallm_serve.adapter import (
    BLOCK_INDEX,
    BLOCKS,
    ROWS,
    Adapter,
    LoraConfig,
    LutConfig,
    SmtConfig,
    lora_modules,
)
from spallm_serve.adapters_store.failures import RejectedError
from spallm_serve.adapters_store.manifest import BaseManifest, LinearShape
from spallm_serve.checkpoint import TABLES


def check_fit(adapter: Adapter, manifest: BaseManifest, max_rank: int) -> None:
    """Refuse an adapter that a base's layers cannot take.

    Args:
        adapter: right by itself (:func:`spallm_serve.adapter_structure.check_structure`).
        manifest: of the base.
        max_rank: of a LoRA.

    Raises:
        RejectedError: names the module, what it is and what was expected.
    """
    config = adapter.config
    if isinstance(config, LutConfig):
        _check_tables(adapter, manifest)
        _check_norms(adapter, manifest)
    elif isinstance(config, SmtConfig):
        _check_blocks(adapter, manifest, config.block_size)
    else:
        _check_products(adapter, manifest, config, max_rank)


def _check_tables(adapter: Adapter, manifest: BaseManifest) -> None:
    for module in adapter.modules(TABLES):
        shape = manifest.linears.get(module)
        if shape is None or shape.bits is None or shape.groups is None:
            raise RejectedError(f"{module}{TABLES}: the base has no such compressed layer")
        tables, rows = adapter.tensors[module + TABLES], adapter.tensors.get(module + ROWS)
        height = shape.rows if rows is None else len(rows)
        expected = [height, shape.groups, 1 << shape.bits]
        if list(tables.shape) != expected:
            raise RejectedError(f"{module}{TABLES}: expected {expected}, got {list(tables.shape)}")
        if rows is not None and int(rows[-1]) >= shape.rows:  # they ascend
            raise RejectedError(
                f"{module}{ROWS}: expected 0 to {shape.rows - 1}, got {int(rows[-1])}"
            )


def _check_norms(adapter: Adapter, manifest: BaseManifest) -> None:
    for name, tensor in adapter.tensors.items():
        if name.endswith((TABLES, ROWS)):
            continue
        shape = manifest.norms.get(name)
        if shape is None:
            raise RejectedError(f"{name}: is no part of a normalisation of the base")
        if tuple(tensor.shape) != shape:
            raise RejectedError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")


def _check_blocks(adapter: Adapter, manifest: BaseManifest, size: int) -> None:
    for module in adapter.modules(BLOCKS):
        shape = manifest.linears.get(module)
        if shape is None or not shape.in_block:
            raise RejectedError(f"{module}{BLOCKS}: the base has no such layer in its blocks")
        blocks, index = adapter.tensors[module + BLOCKS], adapter.tensors[module + BLOCK_INDEX]
        for block, (row, column) in zip(blocks, index.tolist(), strict=True):
            height, width = shape.rows - row * size, shape.columns - column * size
            if height <= 0 or width <= 0:
                raise RejectedError(
                    f"{module}{BLOCK_INDEX}: block ({row}, {column}) is outside of "
                    f"[{shape.rows}, {shape.columns}]"
                )
            if bool(block[height:].any()) or bool(block[:, width:].any()):
                raise RejectedError(
                    f"{module}{BLOCKS}: block ({row}, {column}) has values beyond the weight's edge"
                )


def _check_products(
    adapter: Adapter, manifest: BaseManifest, config: LoraConfig, max_rank: int
) -> None:
    if config.r > max_rank:
        raise RejectedError(f"r is {config.r}; this server takes LoRAs up to rank {max_rank}")
    for module, (a, b) in lora_modules(adapter).items():
        shape: LinearShape | None = manifest.linears.get(module)
        if shape is None:
            raise RejectedError(f"{module}: the base has no such linear layer")
        expected = [config.r, shape.columns], [shape.rows, config.r]
        if [list(a.shape), list(b.shape)] != list(expected):
            raise RejectedError(
                f"{module}: expected lora_A {expected[0]} and lora_B {expected[1]}, got "
                f"{list(a.shape)} and {list(b.shape)}"
            )
