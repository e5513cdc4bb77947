"""Sketches: what they stand for, what they weigh, and the identity of a base."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from torch import Tensor

from spallm_serve.kernels.packing import pack_codes
from spallm_serve.sketch import Sketch, base_digest, sketch_nbytes

SHAPES = [
    (bits, columns, groups)
    for bits, (columns, groups) in itertools.product((2, 3, 4), [(1, 1), (9, 3), (129, 1), (40, 8)])
]


def random_parts(bits: int, columns: int, groups: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(bits + columns)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    return codes, torch.randn(rows, groups, 1 << bits, generator=generator)


def random_base() -> dict[str, Tensor]:
    return {name: pack_codes(random_parts(2, 16, 1)[0], 2) for name in ("a", "b.c", "b")}


@pytest.mark.parametrize(("bits", "columns", "groups"), SHAPES)
def test_round_trip(bits: int, columns: int, groups: int) -> None:
    codes, tables = random_parts(bits, columns, groups)
    sketch = Sketch.from_codes(codes, tables)
    assert torch.equal(sketch.codes, codes)
    assert torch.equal(sketch.tables, tables.half())
    assert (sketch.bits, sketch.columns, sketch.weight_count) == (bits, columns, codes.numel())
    weight = sketch.weight()
    assert weight.dtype == torch.float32
    for row, column in itertools.product(range(codes.shape[0]), range(columns)):
        group = column // (columns // groups)
        entry = tables[row, group, int(codes[row, column])].half()
        assert weight[row, column] == entry.float()


@pytest.mark.parametrize(("bits", "columns", "groups"), SHAPES)
def test_nbytes_are_those_of_the_tensors(bits: int, columns: int, groups: int) -> None:
    sketch = Sketch.from_codes(*random_parts(bits, columns, groups))
    stored = sum(len(t.numpy().tobytes()) for t in (sketch.planes, sketch.tables))
    assert stored == sketch.nbytes == sketch_nbytes(5, columns, bits, groups)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 7e4])
def test_tables_that_float16_cannot_hold_are_refused(value: float) -> None:
    codes, tables = random_parts(2, 8, 2)
    tables[3, 1, 2] = value
    with pytest.raises(ValueError, match="float16"):
        Sketch.from_codes(codes, tables)


def test_digest_is_a_sha256() -> None:
    digest = base_digest(random_base())
    assert len(digest) == 64
    assert set(digest) <= set("0123456789abcdef")
    assert base_digest({}) == hashlib.sha256().hexdigest()


def test_digest_does_not_depend_on_the_order_of_a_mapping() -> None:
    base = random_base()
    digests = {base_digest(dict(order)) for order in itertools.permutations(base.items())}
    assert len(digests) == 1
    assert digests == {base_digest(iter(sorted(base.items())))}


def test_digest_does_not_depend_on_strides() -> None:
    base = random_base()
    strided = {name: planes.mT.contiguous().mT for name, planes in base.items()}
    assert base_digest(strided) == base_digest(base)


def test_digest_changes_with_any_code() -> None:
    codes, _ = random_parts(3, 9, 1, rows=2)
    digests = {base_digest({"layer": pack_codes(codes, 3)})}
    for row, column in itertools.product(range(2), range(9)):
        changed = codes.clone()
        changed[row, column] ^= 4
        digests.add(base_digest({"layer": pack_codes(changed, 3)}))
    assert len(digests) == 1 + 18


def test_digest_changes_with_a_name_a_shape_or_swapped_layers() -> None:
    base = random_base()
    planes = base["a"]
    base["b"] = planes ^ 1
    variants = [
        base,
        {"renamed" if name == "a" else name: layer for name, layer in base.items()},
        {**base, "a": base["b"], "b": base["a"]},
        {**base, "a": planes.reshape(2, 10, 1)},
        {**base, "a": planes.reshape(5, 2, 2)},
        {name: layer for name, layer in base.items() if name != "a"},
        {**base, "d": planes[:, :0]},
    ]
    assert len({base_digest(variant) for variant in variants}) == len(variants)


def test_digest_shows_bytes_that_move_between_layers() -> None:
    data = torch.arange(24, dtype=torch.uint8)
    one = {"a": data[:8].view(2, 2, 2), "b": data[8:].view(2, 4, 2)}
    other = {"a": data[:16].view(2, 4, 2), "b": data[16:].view(2, 2, 2)}
    assert base_digest(one) != base_digest(other)
