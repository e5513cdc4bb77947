"""Merged layers with a table for each slot, and shares of them, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spallm_serve.errors import UserError
from spallm_serve.kernels.choice import FORCE_VARIABLE, integers_held
from spallm_serve.kernels.cpu.integers import INTEGERS_VARIABLE, why_no_integers
from spallm_serve.kernels.cpu.library import LEVELS, best_level
from spallm_serve.kernels.held_tables import HeldTables
from spallm_serve.kernels.packing import pack_codes
from spallm_serve.server.additions import BlockAddition, LoraAddition
from spallm_serve.server.sharding import Shard
from spallm_serve.server.slotted import Dense, Linear, Sketched, SlottedLinear, StepSlots
from spallm_serve.server.slotted_norm import SlottedNorm

SLOTS = 3
# Bits, groups and rows; none are of a linear that was left as it is.
FORMATS = st.tuples(st.sampled_from([0, 2, 3, 4]), st.sampled_from([1, 2]), st.integers(1, 20))


def random_linear(
    rows: int, columns: int, bits: int, groups: int, seed: int
) -> tuple[Sketched, Tensor]:
    """A sketch and its codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator)
    tables = torch.randn(rows, groups, 1 << bits, generator=generator).half()
    return Sketched(pack_codes(codes.to(torch.uint8), bits), tables, columns), codes


def held(layer: SlottedLinear, own: dict[int, Tensor]) -> dict[int, HeldTables]:
    """Tables as a layer holds them."""
    return {
        number: layer.base_tables(layer.parts[number]).alike(tables)
        for number, tables in own.items()
    }


def dense(codes: Tensor, tables: Tensor) -> Tensor:
    """float64 ``[out, in]``."""
    rows, columns = codes.shape
    groups = tables.shape[1]
    group = torch.arange(columns) // (columns // groups)
    return tables.double()[torch.arange(rows)[:, None], group, codes.long()]


@pytest.mark.parametrize("integers", [None, torch.int8, torch.int16])
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(FORMATS, min_size=1, max_size=4),
    st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=9),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_every_token_is_multiplied_by_its_slots_own_weight(
    monkeypatch: pytest.MonkeyPatch,
    integers: torch.dtype | None,
    formats: list[tuple[int, int, int]],
    slots: list[int],
    padding: int,
    seed: int,
) -> None:
    """Whatever formats are merged, with what is added to one slot and with padded batches."""
    if integers is not None and (reason := why_no_integers(integers)) is not None:
        pytest.skip(reason)
    asked = "0" if integers is None else str(torch.iinfo(integers).bits)
    monkeypatch.setenv(INTEGERS_VARIABLE, asked)
    columns = 24
    linears: list[Linear] = []
    base: list[Tensor] = []
    codes_of: dict[int, Tensor] = {}
    for number, (bits, groups, rows) in enumerate(formats):
        if bits:
            sketch, codes_of[number] = random_linear(rows, columns, bits, groups, seed + number)
            linears.append(sketch)
            base.append(dense(codes_of[number], sketch.tables))
        else:
            linears.append(Dense(torch.randn(rows, columns)))
            base.append(linears[-1].weight.double())
    layer = SlottedLinear.of(linears, SLOTS, torch.float32)
    weights = {0: torch.cat(base)}
    twice_the_sum = LoraAddition(torch.full((columns, 1), 2.0), torch.ones(1, formats[0][2]))
    for slot in range(1, SLOTS):
        own = {
            number: random_linear(rows, columns, bits, groups, seed + 100 * slot + number)[0].tables
            for number, (bits, groups, rows) in enumerate(formats)
            if bits and (number + slot) % 2
        }
        layer.fill(slot, held(layer, own), {0: twice_the_sum} if slot == 1 else {})
        weights[slot] = torch.cat(
            [
                dense(codes_of[number], own[number]) if number in own else weight
                for number, weight in enumerate(base)
            ]
        )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(slots) + padding, columns, generator=generator)
    bias = torch.randn(len(weights[0]), generator=generator)
    y = layer(x, bias, StepSlots.of(slots))
    with torch.inference_mode():
        assert torch.equal(layer(x, bias, StepSlots.of(slots)), y)
    expected = torch.stack(
        [weights[slot] @ token.double() for slot, token in zip(slots, x, strict=False)]
    ) + bias.double()  # fmt: skip
    for place, slot in enumerate(slots):
        if slot == 1:
            expected[place, : formats[0][2]] += 2 * x[place].double().sum()
    off = {None: 1e-3, torch.int8: 0.2, torch.int16: 1e-2}[integers]
    close = {"rtol": 1e-3, "atol": off}
    torch.testing.assert_close(y[: len(slots)].double(), expected, **close)
    # Filling with nothing makes the base of it again.
    layer.fill(1, {}, {})
    again = layer(x, bias, StepSlots.of([1] * len(x)))
    torch.testing.assert_close(again, layer(x, bias, StepSlots()))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 10**6),
)
def test_shares_make_the_whole(bits: int, groups: int, workers: int, seed: int) -> None:
    rows, columns = 8 * workers, 32
    whole, codes = random_linear(rows, columns, bits, groups, seed)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    expected = x.double() @ dense(codes, whole.tables).T
    by_rows, by_columns = [], torch.zeros(3, rows)
    for worker in range(workers):
        tall, wide = rows // workers, columns // workers
        shard = Shard(worker * tall, tall, 0, columns, columns)
        part = SlottedLinear.of([shard.sketched(whole.planes, whole.tables)], 1, torch.float32)
        by_rows.append(part(x, None, StepSlots()))
        shard = Shard(0, rows, worker * wide, wide, columns)
        if (groups > workers and groups % workers) or (groups > 1 and wide % (columns // groups)):
            with pytest.raises(UserError, match="groups"):
                shard.sketched(whole.planes, whole.tables)
            return
        part = SlottedLinear.of([shard.sketched(whole.planes, whole.tables)], 1, torch.float32)
        by_columns += part(shard.inputs(x), None, StepSlots())
    # Tables may be held as integers, and a share's rows in units of their own.
    off = 0.2 if integers_held("cpu", torch.float32) == torch.int8 else 1e-2
    torch.testing.assert_close(torch.cat(by_rows, 1).double(), expected, rtol=1e-3, atol=off)
    torch.testing.assert_close(by_columns.double(), expected, rtol=1e-3, atol=off)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codes_are_held_once_whatever_dtype_they_are_for(bits: int) -> None:
    """Kernels want them in orders of their own; what one order held is gone with the next."""
    whole, codes = random_linear(64, 128, bits, 2, 0)
    layer = SlottedLinear.of([whole], 1, torch.float32)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    first = layer(x, None, StepSlots())
    half = layer(x.bfloat16(), None, StepSlots())
    expected = x.double() @ dense(codes, whole.tables).T
    torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.5)
    assert torch.equal(layer(x, None, StepSlots()), first)
    (segment,) = layer._segments
    tensors = [value for value in vars(segment).values() if isinstance(value, Tensor)]
    assert len(tensors) == 1


def test_columns_that_are_no_whole_bytes_are_refused() -> None:
    whole, _ = random_linear(4, 24, 2, 1, 0)
    with pytest.raises(UserError, match="multiples of 8"):
        Shard(0, 4, 12, 12, 24).sketched(whole.planes, whole.tables)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.sampled_from([4, 6, 8]), st.booleans(), st.integers(0, 10**6))
def test_shares_of_blocks_make_the_whole(workers: int, size: int, by_rows: bool, seed: int) -> None:
    """Whether or not a share ends within a block."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 2 * size * workers // 2 * 3, 4 * size * workers
    tall, wide = (rows // workers, columns) if by_rows else (rows, columns // workers)
    places = [(r, c) for r in range(rows // size) for c in range(columns // size)]
    chosen = torch.randperm(len(places), generator=generator)[:5]
    index = torch.tensor(places, dtype=torch.int32)[chosen]
    blocks = torch.randn(len(index), size, size, generator=generator)

    def whole(blocks: Tensor, index: Tensor, size: int, rows: int, columns: int) -> Tensor:
        found = torch.zeros(rows, columns)
        for block, (row, column) in zip(blocks, (index * size).tolist(), strict=True):
            found[row : row + size, column : column + size] += block
        return found

    shares = []
    for worker in range(workers):
        row, column = (worker * tall, 0) if by_rows else (0, worker * wide)
        share = Shard(row, tall, column, wide, columns)
        shares.append(whole(*share.blocks(blocks, index, size), tall, wide))
    found = torch.cat(shares, 0 if by_rows else 1)
    assert torch.equal(found, whole(blocks, index, size, rows, columns))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_slots_own_norm_is_that_of_its_tokens_alone(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 6, generator=generator)
    own = torch.randn(6, generator=generator)
    norm = SlottedNorm(6, 1e-5, offset)
    norm.fill(2, own)
    y = torch.zeros_like(x)
    norm.correct(y, x, StepSlots.of([0, 2, 1, 2]))
    expected = torch.nn.functional.rms_norm(x.double(), (6,), own.double() + offset, 1e-5)
    torch.testing.assert_close(y[[1, 3]].double(), expected[[1, 3]], rtol=1e-5, atol=1e-5)
    assert not y[[0, 2]].any()
    norm.fill(2, None)
    norm.correct(y.zero_(), x, StepSlots.of([2, 2, 2, 2]))
    assert not y.any()


@pytest.mark.parametrize("kernel", ["reference", *(f"cpu-{level}" for level in LEVELS)])
def test_tables_rounded_beforehand_give_the_same_to_the_bit(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel rounds them in any case; elsewhere they are held as they are."""
    level = kernel.removeprefix("cpu-")
    if level in LEVELS and LEVELS.index(level) > best_level():
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv(FORCE_VARIABLE, kernel)
    made = [
        random_linear(9, 24, bits, groups, bits)[0] for bits, groups in ((4, 2), (3, 1), (2, 3))
    ]
    own = {number: random_linear(9, 24, bits, groups, 7)[0].tables
           for number, (bits, groups) in enumerate(((4, 2), (3, 1), (2, 3)))}  # fmt: skip
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = SlottedLinear.of(made, 2, dtype)
        layer.fill(1, held(layer, own), {})
        found.append(layer(x, None, StepSlots.of([0, 1, 1, 0, 1])))
    assert torch.equal(*found)


def test_what_is_added_goes_to_the_layers_device() -> None:
    there = torch.device("meta")
    lora = LoraAddition(torch.ones(3, 1), torch.ones(1, 2)).to(there)
    blocks = BlockAddition(torch.ones(1, 2, 2), torch.zeros(1, 2, dtype=torch.int32), 2).to(there)
    assert {lora.down.device, lora.up.device, blocks.blocks.device, blocks.index.device} == {there}
    norm = SlottedNorm(4, 1e-5, 0.0, there)
    norm.fill(1, torch.ones(4))
    assert norm._weights[1].device == there
