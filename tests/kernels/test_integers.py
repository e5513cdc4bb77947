"""Products of tables as 8-bit and 16-bit integers are near float64's, and no sum overflows."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spallm_serve.kernels import prepare_codes
from spallm_serve.kernels.backend import Request
from spallm_serve.kernels.choice import FORCE_VARIABLE, integers_held
from spallm_serve.kernels.cpu import integers
from spallm_serve.kernels.cpu.backend import BLAS_TOKENS, INVARIANT_VARIABLE, CpuBackend
from spallm_serve.kernels.cpu.integers import (
    INTEGERS_VARIABLE,
    LARGEST_ENTRY,
    fastest_integers,
    from_integers,
    to_integers,
    why_no_integers,
)
from spallm_serve.kernels.cpu.library import LEVELS
from spallm_serve.kernels.held_tables import HeldTables
from spallm_serve.kernels.packing import pack_codes

# Instructions that this processor has, and products of integers with them.
_ABLE = [
    (level, dtype)
    for number, level in enumerate(LEVELS)
    for dtype in LARGEST_ENTRY
    if why_no_integers(dtype, number) is None
]
_FASTEST = fastest_integers()
_WHY_NONE = str(why_no_integers(torch.int16))
some = pytest.mark.skipif(not _ABLE, reason=_WHY_NONE)
best = pytest.mark.skipif(_FASTEST is None, reason=_WHY_NONE)
able = pytest.mark.parametrize(("level", "dtype"), _ABLE)
native = pytest.mark.skipif(
    CpuBackend("scalar").why_not(Request("cpu", torch.float32, 4, 8, 8, 1)) is not None,
    reason="no compiled kernels",
)
_STEP = 32
# Steps that a chunk of codes covers, where they fill it.
_BLOCK_STEPS = {2: 8, 3: 16, 4: 4}
_LARGEST_SUM = 2.0**31 * (1 - 2.0**-7)


def layer(
    rows: int, columns: int, bits: int, groups: int, slots: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` and tables in float16, all slots'."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    tables = torch.randn(slots, rows, groups, 1 << bits, generator=generator)
    return codes, (tables * torch.rand(slots, rows, 1, 1, generator=generator)).half()


def dense(codes: Tensor, tables: Tensor) -> Tensor:
    """float64 ``[slots, out, in]``."""
    rows, columns = codes.shape
    group = torch.arange(columns) // (columns // tables.shape[2])
    return tables.double()[:, torch.arange(rows)[:, None], group, codes.long()]


def multiply(
    x: Tensor,
    codes: Tensor,
    tables: Tensor,
    slots: Tensor | None,
    level: str | None = None,
    dtype: torch.dtype = _FASTEST or torch.int16,
) -> Tensor:
    bits, groups = tables.shape[-1].bit_length() - 1, tables.shape[2]
    packed = prepare_codes(pack_codes(codes, bits), codes.shape[1], groups, x.dtype)
    return CpuBackend(level).integer_linear(x, packed, *to_integers(tables, dtype), slots)


def lanes(level: str, bits: int, steps: int) -> Tensor:
    """``[columns]``: the lane of a register that a column's products of 16-bit integers are summed
    in."""
    column = torch.arange(steps * _STEP)
    step, place = column // _STEP, column % _STEP
    if level != "avx2":
        return place // 2
    if bits != 2:
        return place % 4 + 4 * (place // 8 % 2)
    block = _BLOCK_STEPS[2]
    whole = step < steps // block * block
    second = torch.where(whole, step // 4 % 2, step % 2)
    return 2 * (place // 2 % 2) + second + 4 * (place // 8 % 2)


def partners(bits: int, steps: int) -> Tensor:
    """``[columns]``: the column that shares a factor with each, among 8-bit integers."""
    column = torch.arange(steps * _STEP)
    step = column // _STEP
    whole = step < steps // _BLOCK_STEPS[bits] * _BLOCK_STEPS[bits]
    if bits == 2:
        return torch.where(whole, column ^ 2 * _STEP, column ^ 1)
    return torch.where(whole, column ^ 2 * _STEP, column ^ _STEP) if bits == 4 else column ^ _STEP


def units(x: Tensor, groups: int, bits: int, level: str, dtype: torch.dtype) -> Tensor:
    """``[tokens, columns]``: what an activation is rounded to whole multiples of, or more."""
    if dtype == torch.int16:
        return token_scales(x, groups, bits, level)[:, None].expand(x.shape)
    size = x.double().abs().reshape(len(x), groups, -1)
    width = size.shape[2]
    padded = torch.nn.functional.pad(size, (0, -width % (2 * _STEP)))
    # The partner of a last step that has none is nothing.
    partner = partners(bits, math.ceil(width / _STEP)).clamp(max=padded.shape[2] - 1)[:width]
    pairs = (padded[..., :width] + padded[..., partner]).flatten(1)
    # As if all that is added up met in one lane.
    most = 255 * 128 / 127
    unit = torch.maximum(
        pairs.amax(1) / (127 * 32766),
        padded.sum((1, 2)) * most / (_LARGEST_SUM - padded[0].numel() / 16 * most),
    )
    return pairs / 127 + unit[:, None]


def token_scales(x: Tensor, groups: int, bits: int, level: str) -> Tensor:
    """The unit of each token's 16-bit integers: no smaller than sums of 32 bits allow."""
    size = x.double().abs().reshape(len(x), groups, -1)
    padded = torch.nn.functional.pad(size, (0, -size.shape[2] % _STEP))
    lane = lanes(level, bits, padded.shape[2] // _STEP)
    count = 8 if level == "avx2" else 16
    by_lane = torch.zeros(len(x), count, dtype=torch.float64)
    by_lane.index_add_(1, lane, padded.sum(1))
    # Steps are filled up to whole ones, with AVX2 to whole pairs.
    together = 2 if level == "avx2" else 1
    steps = math.ceil(size.shape[2] / _STEP / together) * together * groups
    rounding = steps * _STEP / count / 2 * 4096
    return torch.maximum(
        size.amax((1, 2)) / 32767, by_lane.amax(1) * 4096 / (_LARGEST_SUM - rounding)
    )


@some
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(_ABLE or [("", torch.int8)]),
    st.sampled_from([2, 3, 4]),
    st.integers(1, 3),
    st.one_of(st.integers(1, 40), st.sampled_from([64, 160, 300, 352, 1024, 2500])),
    st.integers(1, 20),
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_products_are_within_the_rounding_of_both_factors(
    able: tuple[str, torch.dtype], bits: int, groups: int, width: int, rows: int, slots: list[int],
    dtype: torch.dtype, outliers: bool, seed: int,
) -> None:  # fmt: skip
    level, kind = able
    codes, tables = layer(rows, groups * width, bits, groups, 5, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(slots), groups * width, generator=generator)
    if outliers:
        x[:, 0] *= 100
    x = x.to(dtype)
    y = multiply(x, codes, tables, torch.tensor(slots, dtype=torch.int32), level, kind)
    assert y.dtype == dtype
    weights = dense(codes, from_integers(*to_integers(tables, kind)))[slots]
    expected = torch.einsum("tc,trc->tr", x.double(), weights)
    unit = units(x, groups, bits, level, kind)
    size = torch.einsum("tc,trc->tr", x.double().abs(), weights.abs())
    bound = 0.501 * torch.einsum("tc,trc->tr", unit, weights.abs()) + 1e-6 * size
    # Entries of 8 bits are multiplied as numbers without a sign, and what that adds is taken away.
    shifted = weights.abs().amax(2) * x.double().abs().sum(1)[:, None]
    bound += 1e-6 * shifted if kind == torch.int8 else 0.0
    rounding = torch.finfo(dtype)
    bound += rounding.eps * (expected.abs() + rounding.smallest_normal)
    assert ((y.double() - expected).abs() <= bound).all()


@able
@pytest.mark.parametrize("entry", [-1.0, 1.0])
@pytest.mark.parametrize("columns", [32, 576, 11008, 400_000])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sums_as_large_as_they_can_be_do_not_overflow(
    bits: int, columns: int, entry: float, level: str, dtype: torch.dtype
) -> None:
    """All products of one sign and size: activations of many columns get fewer bits for it."""
    codes = torch.zeros(3, columns, dtype=torch.uint8)
    tables = torch.full((1, 3, 1, 1 << bits), entry)
    x = torch.ones(5, columns)
    x[1] = -1
    x[2, columns // 2 :] = 0
    x[3] = 0
    x[3, 7] = 1e4
    if columns < 40_000:  # all else of the widest would be rounded away
        x[4, ::_STEP] = 100.0  # in one lane only
    expected = x.double() @ dense(codes, tables)[0].T
    y = multiply(x, codes, tables, None, level, dtype)
    rounded = units(x, 1, bits, level, dtype) * (x != 0)
    bound = 0.501 * rounded.sum(1, keepdim=True)
    assert (bound <= 0.06 * expected.abs()).all()
    assert ((y.double() - expected).abs() <= bound + 1e-6 * expected.abs()).all()


@able
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_token_has_the_same_product_whatever_others_there_are(
    bits: int, level: str, dtype: torch.dtype
) -> None:
    codes, tables = layer(21, 600, bits, 1, 4, 0)
    x = torch.randn(17, 600, generator=torch.Generator().manual_seed(1))
    slots = torch.arange(17, dtype=torch.int32) % 4
    together = multiply(x, codes, tables, slots, level, dtype)
    for token in range(17):
        slot = int(slots[token])
        alone = multiply(x[token : token + 1], codes, tables[slot : slot + 1], None, level, dtype)
        assert torch.equal(alone[0], together[token])


@able
@pytest.mark.parametrize(
    ("groups", "width"), [(1, 4001), (3, 1399), (9, 700), (11, 700), (40, 101)]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_wide_layers_are_multiplied_in_spans(
    bits: int, groups: int, width: int, level: str, dtype: torch.dtype
) -> None:
    """Activations do not fit the first cache; a span may end within a group. To the bit what one
    token alone has, which takes no spans."""
    codes, tables = layer(37, groups * width, bits, groups, 9, 0)
    x = torch.randn(11, groups * width, generator=torch.Generator().manual_seed(1))
    for slots in ([1] * 8, [3, 0, 2], [4, 1, 2, 3], [5, 0, 1, 2, 8, 6, 7, 3], [2, 2, 2, 0, 1, 3]):
        some = x[: len(slots)].contiguous()
        together = multiply(some, codes, tables, torch.tensor(slots).int(), level, dtype)
        weights = dense(codes, from_integers(*to_integers(tables, dtype)))[slots]
        expected = torch.einsum("tc,trc->tr", some.double(), weights)
        size = weights.square().sum(2).sqrt()  # of products with normal numbers
        assert ((together.double() - expected).abs() <= 0.03 * size).all()
        for token, slot in enumerate(slots):
            only = some[token : token + 1], codes, tables[slot : slot + 1]
            alone = multiply(*only, None, level, dtype)
            assert torch.equal(alone[0], together[token])


@able
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_activations_that_are_no_numbers_or_nothing(
    bits: int, level: str, dtype: torch.dtype
) -> None:
    """Wherever they are: in whole blocks and in a last one that is not."""
    codes, tables = layer(4, 600, bits, 2, 1, 0)
    x = torch.randn(30, 600, generator=torch.Generator().manual_seed(0))
    usual = multiply(x, codes, tables, None, level, dtype)
    x[3], x[4] = 0, 1e-37 * x[4]
    x[5] *= 1e30
    x[6] *= 1e36
    x[7] *= 1e38
    x[8] *= 1e-28
    for token in range(9, 30):
        x[token, 29 * (token - 9)] = [torch.nan, torch.inf, -torch.inf][token % 3]
    y = multiply(x, codes, tables, None, level, dtype)
    assert torch.equal(y[:3], usual[:3])
    assert y[9:].isnan().all()
    assert not y[3].any() and y[4].abs().max() < 1e-34
    off = 1e-3 if dtype == torch.int16 else 5e-2
    size = dense(codes, tables)[0].square().sum(1).sqrt().float()
    for token, factor in ((5, 1e30), (6, 1e36), (8, 1e-28)):
        assert ((y[token] / factor - usual[token]).abs() <= off * size).all()
    # Beyond what float32 adds: right or no number, never another one.
    wrong = (y[7] / 1e38 - usual[7]).abs() > 10 * off * size
    assert (y[7].isfinite() <= ~wrong).all()


@best
def test_a_token_of_a_long_prompt_has_the_product_that_it_has_alone() -> None:
    """In float32 those go to the BLAS, whose sums depend on their number."""
    codes, tables = layer(40, 256, 4, 1, 3, 0)
    x = torch.randn(3 * BLAS_TOKENS, 256, generator=torch.Generator().manual_seed(0))
    slots = torch.ones(len(x), dtype=torch.int32)
    slots[::13] = 2
    y = multiply(x, codes, tables, slots)
    few = multiply(x[::13].contiguous(), codes, tables, slots[::13].contiguous())
    assert torch.equal(y[::13], few)
    alone = multiply(x[1:2], codes, tables, slots[1:2])
    assert torch.equal(y[1:2], alone)


@best
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("dtype", [dtype for level, dtype in _ABLE if level == _ABLE[-1][0]])
def test_bfloat16_of_many_tokens_of_a_slot_goes_to_the_blas(
    dtype: torch.dtype, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are instructions for it; others in the same call do not, nor any that are to have
    the same product whatever others there are."""
    monkeypatch.setattr(CpuBackend, "rounds_tables", lambda *_: rounds)
    codes, tables = layer(40, 256, 4, 2, 6, 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * BLAS_TOKENS, 256, generator=generator).bfloat16()
    # Of slot 1 there are 128 tokens, of three others 64 each: more than are multiplied at a time.
    slots = (torch.arange(len(x)) % 5).clamp(min=1).int()
    y = multiply(x, codes, tables, slots, dtype=dtype)
    weights = dense(codes, from_integers(*to_integers(tables, dtype)))[slots.long()]
    expected = torch.einsum("tc,trc->tr", x.double(), weights)
    size = torch.einsum("tc,trc->tr", x.double().abs(), weights.abs())
    assert ((y.double() - expected).abs() <= 2.0**-7 * size).all()
    monkeypatch.setenv(INVARIANT_VARIABLE, "1")
    alone = multiply(x, codes, tables, slots, dtype=dtype)
    few = slots != 1
    assert torch.equal(y[few], alone[few])
    assert torch.equal(y, alone) != rounds


@best
def test_what_does_not_belong_together_is_refused() -> None:
    codes, tables = layer(4, 64, 4, 1, 2, 0)
    x = torch.zeros(3, 64)
    with pytest.raises(ValueError, match="slot"):
        multiply(x, codes, tables, torch.tensor([0, 2, 1], dtype=torch.int32))
    many = torch.zeros(300, dtype=torch.int32)
    many[200] = 7
    with pytest.raises(ValueError, match="200"):
        multiply(torch.zeros(300, 64), codes, tables, many)
    packed = prepare_codes(pack_codes(codes, 4), 64, 1, torch.float32)
    whole = to_integers(tables, _FASTEST or torch.int16)
    with pytest.raises(ValueError, match="codes"):
        CpuBackend().integer_linear(x[:, :32].contiguous(), packed, *whole, None)
    with pytest.raises(ValueError, match="float64"):
        CpuBackend().integer_linear(x.double(), packed, *whole, None)


@best
@pytest.mark.parametrize("dtype", [dtype for level, dtype in _ABLE if level == _ABLE[-1][0]])
def test_held_tables_are_integers_where_it_is_asked_for(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tables = layer(6, 32, 3, 2, 1, 0)
    asked = str(torch.iinfo(dtype).bits)
    monkeypatch.setenv(INTEGERS_VARIABLE, asked)
    held = HeldTables.of(tables[0], 3, torch.float32)
    assert held.entries.shape == (3, 6, 2, 8) and held.entries.dtype == dtype
    assert held.slot_bytes == 6 * 2 * 8 * dtype.itemsize + 6 * 4
    own = held.alike(2 * tables[0, :2])
    part = held.rows(1, 4, 6)
    part.copy_(own)
    assert torch.equal(held.entries[1, 4:], own.entries)
    assert held.scales is not None and own.scales is not None
    assert torch.equal(held.scales[1, 4:], own.scales)
    base = held.rows(0, 0, 6)
    mixed = base.replaced(torch.tensor([3, 1]), own)
    assert mixed.scales is not None and base.scales is not None
    assert torch.equal(mixed.scales[[3, 1]], own.scales)
    assert torch.equal(mixed.entries[[0, 2, 4, 5]], base.entries[[0, 2, 4, 5]])
    monkeypatch.setenv(INTEGERS_VARIABLE, "0")
    assert HeldTables.of(tables[0], 3, torch.float32).scales is None
    monkeypatch.setenv(INTEGERS_VARIABLE, asked)
    assert integers_held("cuda", torch.float32) is None
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    with pytest.raises(ValueError, match=f"INTEGERS={asked}: reference has no integers"):
        integers_held("cpu", torch.float32)


@native
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("able", "fastest"),
    [
        ((), None),
        ((torch.int16,), torch.int16),
        ((torch.int8, torch.int16), torch.int8),
    ],
)
def test_integers_are_held_where_they_are_multiplied_faster(
    able: tuple[torch.dtype, ...],
    fastest: torch.dtype | None,
    dtype: torch.dtype,
    rounds: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the dtype of the activations, and whether it has instructions of its own."""
    monkeypatch.delenv(INTEGERS_VARIABLE, raising=False)
    monkeypatch.setattr(CpuBackend, "rounds_tables", lambda *_: rounds)
    monkeypatch.setattr(
        integers, "why_no_integers", lambda dtype, level: None if dtype in able else "none"
    )
    assert integers_held("cpu", dtype) == fastest
    monkeypatch.setenv(INTEGERS_VARIABLE, "0")
    assert integers_held("cpu", dtype) is None


@native
def test_a_processor_without_instructions_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    none = SimpleNamespace(spallm_cpu_integers=lambda *_: ctypes.c_int32(0).value)
    monkeypatch.setattr(integers, "library", lambda: none)
    monkeypatch.delenv(INTEGERS_VARIABLE, raising=False)
    assert integers_held("cpu", torch.float32) is None
    for bits in "8", "16":
        monkeypatch.setenv(INTEGERS_VARIABLE, bits)
        told = f"SPALLM_CPU_INTEGERS={bits}: there are no faster products of {bits}-bit integers"
        with pytest.raises(ValueError, match=told):
            integers_held("cpu", torch.float32)
    monkeypatch.setenv(INTEGERS_VARIABLE, "yes")
    with pytest.raises(ValueError, match="SPALLM_CPU_INTEGERS='yes': expected 0, 8 or 16"):
        integers_held("cpu", torch.float32)


@native
def test_instructions_without_products_of_integers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes, tables = layer(4, 64, 4, 1, 1, 0)
    with pytest.raises(ValueError, match="no products of integers with scalar"):
        multiply(torch.zeros(1, 64), codes, tables, None, "scalar")
    monkeypatch.setenv(FORCE_VARIABLE, "cpu-scalar")
    assert HeldTables.of(tables[0], 2, torch.float32).scales is None
    monkeypatch.setenv(INTEGERS_VARIABLE, "8")
    with pytest.raises(ValueError, match="no faster products of 8-bit integers with scalar"):
        HeldTables.of(tables[0], 2, torch.float32)
