"""What there is to say about an adapter."""

from __future__ import annotations

from dataclasses import dataclass

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
    adapter_digest,
)
from spallm_serve.checkpoint import TABLES

Fact = str | int | float | bool


@dataclass(frozen=True)
class ModuleFacts:
    """One module, or one parameter of a normalisation.

    Attributes:
        name: in the model.
        shape: of the tables or blocks; of a LoRA, that of the product, ``[out, in]``.
        dtype: of the values.
        nbytes: with row numbers and positions.
        details: what the kind of adapter has beside.
    """

    name: str
    shape: list[int]
    dtype: str
    nbytes: int
    details: dict[str, Fact]


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter.

    Attributes:
        kind: its ``peft_type``.
        base: what the base was called; may be empty.
        base_digest: None for a LoRA trained elsewhere.
        digest: its own.
        nbytes: of all tensors.
        summary: what the kind of adapter has to say as a whole.
        modules: in name order.
    """

    kind: str
    base: str
    base_digest: str | None
    digest: str
    nbytes: int
    summary: dict[str, Fact]
    modules: list[ModuleFacts]


def adapter_facts(adapter: Adapter) -> AdapterFacts:
    """Facts of an adapter whose structure was checked."""
    config = adapter.config
    if isinstance(config, LutConfig):
        modules = _lut_modules(adapter)
        summary = _lut_summary(modules)
    elif isinstance(config, SmtConfig):
        modules = _smt_modules(adapter)
        summary = _smt_summary(modules, config)
    else:
        modules = _lora_modules(adapter)
        summary = _lora_summary(config)
    return AdapterFacts(
        kind=config.peft_type,
        base=base_name(adapter),
        base_digest=config.base_digest,
        digest=adapter_digest(adapter),
        nbytes=adapter.nbytes,
        summary=summary,
        modules=modules,
    )


def base_name(adapter: Adapter) -> str:
    """What the adapter's configuration calls its base; may be empty."""
    if isinstance(adapter.config, LoraConfig):
        return str(adapter.config.fields.get("base_model_name_or_path") or "")
    return adapter.config.base_model_name_or_path


def _lut_modules(adapter: Adapter) -> list[ModuleFacts]:
    found: list[ModuleFacts] = []
    for name, tensor in sorted(adapter.tensors.items()):
        if name.endswith(ROWS):
            continue
        if not name.endswith(TABLES):
            found.append(_facts(name, tensor, tensor.nbytes, {}))
            continue
        module = name.removesuffix(TABLES)
        rows = adapter.tensors.get(module + ROWS)
        height, groups, entries = tensor.shape
        nbytes = tensor.nbytes + (0 if rows is None else rows.nbytes)
        details: dict[str, Fact] = {
            "bits": entries.bit_length() - 1,
            "groups": groups,
            "rows": height,
            "all_rows": rows is None,
        }
        found.append(_facts(module, tensor, nbytes, details))
    return found


def _lut_summary(modules: list[ModuleFacts]) -> dict[str, Fact]:
    tables = [module.details for module in modules if module.details]
    return {
        "bits": _values([details["bits"] for details in tables]),
        "groups": _values([details["groups"] for details in tables]),
        "rows": sum(int(details["rows"]) for details in tables),
        "norms": len(modules) - len(tables),
    }


def _smt_modules(adapter: Adapter) -> list[ModuleFacts]:
    found: list[ModuleFacts] = []
    for module in adapter.modules(BLOCKS):
        blocks, index = adapter.tensors[module + BLOCKS], adapter.tensors[module + BLOCK_INDEX]
        nbytes = blocks.nbytes + index.nbytes
        found.append(_facts(module, blocks, nbytes, {"blocks": len(index)}))
    return found


def _smt_summary(modules: list[ModuleFacts], config: SmtConfig) -> dict[str, Fact]:
    return {
        "block_size": config.block_size,
        "blocks": sum(int(module.details["blocks"]) for module in modules),
    }


def _lora_modules(adapter: Adapter) -> list[ModuleFacts]:
    found: list[ModuleFacts] = []
    for module in adapter.modules(LORA_A):
        a, b = adapter.tensors[module + LORA_A], adapter.tensors[module + LORA_B]
        shape = [len(b), a.shape[1]]
        name = module.removeprefix(LORA_PREFIX)
        found.append(ModuleFacts(name, shape, _dtype(a), a.nbytes + b.nbytes, {"rank": len(a)}))
    return found


def _lora_summary(config: LoraConfig) -> dict[str, Fact]:
    return {"rank": config.r, "alpha": config.lora_alpha, "scale": config.scale}


def _facts(name: str, tensor: Tensor, nbytes: int, details: dict[str, Fact]) -> ModuleFacts:
    return ModuleFacts(name, list(tensor.shape), _dtype(tensor), nbytes, details)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _values(found: list[Fact]) -> str:
    """The different ones, in order."""
    return ", ".join(str(value) for value in sorted(set(found), key=float))
