"""How far two adapters are apart, module by module."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spallm_serve.adapter import BLOCK_INDEX, BLOCKS, ROWS, Adapter, LoraConfig, SmtConfig
from spallm_serve.adapters_store.delta import changed_modules, lora_delta
from spallm_serve.checkpoint import TABLES


@dataclass(frozen=True)
class ModuleDifference:
    """What both adapters have of a module.

    Attributes:
        name: of the module, or of a normalisation's parameter.
        largest: of the absolute differences; NaN where there is nothing to compare.
        rms: root of their mean square.
        note: what could not be compared, or was taken as zero; may be empty.
    """

    name: str
    largest: float
    rms: float
    note: str = ""


@dataclass(frozen=True)
class AdapterDifference:
    """Two adapters of one kind.

    Attributes:
        only_a, only_b: modules that one alone has.
        modules: of both, those furthest apart first.
    """

    only_a: list[str]
    only_b: list[str]
    modules: list[ModuleDifference]


def compare(a: Adapter, b: Adapter) -> AdapterDifference:
    """Compare the values of two adapters of one kind, whose structure was checked.

    Tables are compared row by row, where both have the row; blocks by their place, one that only
    one adapter has with zeros; LoRAs by ``scale B A``, since many A and B make the same product.
    """
    names_a, names_b = _names(a), _names(b)
    one = _comparison(a, b)
    modules = [one(name) for name in sorted(names_a & names_b)]
    # What cannot be compared comes first, being no closer than anything else.
    modules.sort(key=lambda module: (-_or_infinity(module.rms), -_or_infinity(module.largest)))
    return AdapterDifference(sorted(names_a - names_b), sorted(names_b - names_a), modules)


def _names(adapter: Adapter) -> set[str]:
    if isinstance(adapter.config, SmtConfig | LoraConfig):
        return set(changed_modules(adapter))
    return {name.removesuffix(TABLES) for name in adapter.tensors if not name.endswith(ROWS)}


def _comparison(a: Adapter, b: Adapter) -> Callable[[str], ModuleDifference]:
    config_a, config_b = a.config, b.config
    if isinstance(config_a, LoraConfig) and isinstance(config_b, LoraConfig):
        return lambda name: _difference(
            name, lora_delta(a, config_a, name), lora_delta(b, config_b, name)
        )
    if isinstance(config_a, SmtConfig):
        return lambda name: _compare_blocks(name, a, b)
    return lambda name: _compare_tables(name, a, b)


def _compare_tables(name: str, a: Adapter, b: Adapter) -> ModuleDifference:
    if name + TABLES not in a.tensors or name + TABLES not in b.tensors:
        return _difference(name, a.tensors[name], b.tensors[name])
    tables_a, tables_b = a.tensors[name + TABLES], b.tensors[name + TABLES]
    rows_a, rows_b = _rows(a, name), _rows(b, name)
    # Which row is where; a row that one adapter leaves to the base is in that one only.
    common = sorted(rows_a.keys() & rows_b.keys())
    note = ""
    if len(common) < max(len(rows_a), len(rows_b)):
        alone = f"{len(rows_a) - len(common):,} and {len(rows_b) - len(common):,}"
        note = f"{len(common):,} rows in both, {alone} in one only"
    if not common:
        return ModuleDifference(name, math.nan, math.nan, note)
    return _difference(
        name,
        tables_a[[rows_a[row] for row in common]],
        tables_b[[rows_b[row] for row in common]],
        note,
    )


def _rows(adapter: Adapter, module: str) -> dict[int, int]:
    """Where the tables of each row lie."""
    rows = adapter.tensors.get(module + ROWS)
    if rows is None:
        return {row: row for row in range(len(adapter.tensors[module + TABLES]))}
    return {row: place for place, row in enumerate(rows.tolist())}


def _compare_blocks(name: str, a: Adapter, b: Adapter) -> ModuleDifference:
    blocks_a, blocks_b = a.tensors[name + BLOCKS], b.tensors[name + BLOCKS]
    if blocks_a.shape[1:] != blocks_b.shape[1:]:
        return ModuleDifference(name, math.nan, math.nan, "other block size")
    places_a, places_b = _places(a, name), _places(b, name)
    places = sorted(places_a.keys() | places_b.keys())
    common = len(places_a.keys() & places_b.keys())
    note = ""
    if common < len(places):
        alone = f"{len(places_a) - common:,} and {len(places_b) - common:,}"
        note = f"{common:,} blocks in both, {alone} in one only"
    nothing = torch.zeros(blocks_a.shape[1:])
    largest, squares = 0.0, 0.0
    for place in places:
        left = blocks_a[places_a[place]].float() if place in places_a else nothing
        right = blocks_b[places_b[place]].float() if place in places_b else nothing
        difference = left - right
        largest = max(largest, float(difference.abs().max()))
        squares += float(difference.double().square().sum())
    values = len(places) * nothing.numel()
    return ModuleDifference(name, largest, math.sqrt(squares / values), note)


def _places(adapter: Adapter, module: str) -> dict[tuple[int, int], int]:
    """Which of the blocks lies at each row and column."""
    index = adapter.tensors[module + BLOCK_INDEX].tolist()
    return {(row, column): number for number, (row, column) in enumerate(index)}


def _difference(name: str, a: Tensor, b: Tensor, note: str = "") -> ModuleDifference:
    if a.shape != b.shape:
        return ModuleDifference(
            name, math.nan, math.nan, f"shapes {list(a.shape)} and {list(b.shape)}"
        )
    difference = a.float() - b.float()
    rms = math.sqrt(float(difference.double().square().mean()))
    return ModuleDifference(name, float(difference.abs().max()), rms, note)


def _or_infinity(value: float) -> float:
    return math.inf if math.isnan(value) else value
