"""Differences of adapters, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spallm_serve.adapter import Adapter, LoraConfig, LutConfig, SmtConfig
from spallm_serve.adapters_store.difference import compare

BASE = "0" * 64


def tables(*values: float) -> Tensor:
    """One row each."""
    return torch.tensor(values).half()[:, None, None].expand(-1, 1, 4).contiguous()


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def lut(**tensors: Tensor) -> Adapter:
    named = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
    return Adapter(LutConfig(base_digest=BASE), named)


def test_equal_adapters() -> None:
    a = lut(x_tables=tables(1, 2), n_weight=torch.ones(3))
    found = compare(a, a)
    assert (found.only_a, found.only_b) == ([], [])
    assert [(each.name, each.largest, each.rms) for each in found.modules] == [
        ("n.weight", 0, 0),
        ("x", 0, 0),
    ]


def test_tables_by_row_and_those_furthest_apart_first() -> None:
    a = lut(
        x_tables=tables(1, 2, 3, 4), y_tables=tables(1, 5), y_rows=rows(1, 7), only_tables=tables(1)
    )
    b = lut(
        x_tables=tables(3, 5), x_rows=rows(2, 3), y_tables=tables(2, 9), y_rows=rows(5, 7),
        n_weight=torch.ones(3),
    )  # fmt: skip
    found = compare(a, b)
    assert (found.only_a, found.only_b) == (["only"], ["n.weight"])
    y, x = found.modules
    assert (y.name, y.largest, y.rms) == ("y", 4, 4)
    assert y.note == "1 rows in both, 1 and 1 in one only"
    assert (x.name, x.largest) == ("x", 1)
    assert x.rms == pytest.approx(math.sqrt(1 / 2))
    assert x.note == "2 rows in both, 2 and 0 in one only"


def test_rows_that_never_meet_and_other_shapes_come_first() -> None:
    a = lut(x_tables=tables(1), x_rows=rows(1), y_tables=tables(1), z_tables=tables(1))
    b = lut(
        x_tables=tables(1), x_rows=rows(2), y_tables=tables(9),
        z_tables=torch.zeros(1, 2, 4, dtype=torch.float16),
    )  # fmt: skip
    first, second, third = compare(a, b).modules
    assert {first.name, second.name} == {"x", "z"}
    assert math.isnan(first.rms)
    assert math.isnan(second.largest)
    assert {first.note, second.note} == {
        "0 rows in both, 1 and 1 in one only",
        "shapes [1, 1, 4] and [1, 2, 4]",
    }
    assert third.rms == 8


def smt(size: int, blocks: dict[tuple[int, int], float]) -> Adapter:
    values = torch.tensor(list(blocks.values())).half()[:, None, None].expand(-1, size, size)
    index = torch.tensor(list(blocks), dtype=torch.int32)
    tensors = {"x.blocks": values.contiguous(), "x.block_index": index}
    return Adapter(SmtConfig(base_digest=BASE, block_size=size), tensors)


def test_blocks_by_place_one_alone_with_zeros() -> None:
    a, b = smt(2, {(0, 1): 3, (4, 4): 1}), smt(2, {(4, 4): 2, (9, 0): 5})
    (found,) = compare(a, b).modules
    assert found.largest == 5
    assert found.rms == pytest.approx(math.sqrt((9 + 1 + 25) / 3))
    assert found.note == "1 blocks in both, 1 and 1 in one only"
    (other,) = compare(a, smt(4, {(4, 4): 1})).modules
    assert other.note == "other block size"


def lora(a: Tensor, b: Tensor, alpha: float) -> Adapter:
    tensors = {"base_model.model.x.lora_A.weight": a, "base_model.model.x.lora_B.weight": b}
    return Adapter(LoraConfig(r=len(a), lora_alpha=alpha), tensors)


def test_loras_by_what_they_change() -> None:
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    turned = torch.linalg.qr(torch.randn(2, 2))[0]
    (same,) = compare(lora(a, b, 2), lora(turned @ a, b @ turned.T / 2, 4)).modules
    assert same.largest < 1e-5
    (other,) = compare(lora(a, b, 2), lora(a[:1], b[:, :1], 1)).modules
    missing = torch.outer(b[:, 1], a[1])
    assert other.largest == pytest.approx(float(missing.abs().max()), rel=1e-4)
    assert other.rms == pytest.approx(float(missing.square().mean().sqrt()), rel=1e-4)
