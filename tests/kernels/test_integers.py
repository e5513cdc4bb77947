"""Tables as 16-bit integers: how near products come to float64, and that no sum overflows."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spallm_serve.kernels import choice, prepare_codes
from spallm_serve.kernels.backend import Request
from spallm_serve.kernels.choice import FORCE_VARIABLE, holds_integers
from spallm_serve.kernels.cpu import integers
from spallm_serve.kernels.cpu.backend import BLAS_TOKENS, CpuBackend
from spallm_serve.kernels.cpu.integers import (
    INTEGERS_VARIABLE,
    LARGEST_ENTRY,
    from_integers,
    to_integers,
    to_integers_together,
    why_no_integers,
)
from spallm_serve.kernels.cpu.library import LEVELS
from spallm_serve.kernels.held_tables import HeldTables
from spallm_serve.kernels.packing import pack_codes

# Instructions that this processor has, and products of integers with them.
_LEVELS = [level for number, level in enumerate(LEVELS) if why_no_integers(number) is None]
some = pytest.mark.skipif(not _LEVELS, reason=str(why_no_integers()))
best = pytest.mark.skipif(why_no_integers() is not None, reason=str(why_no_integers()))
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
    x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, level: str | None = None
) -> Tensor:
    bits, groups = tables.shape[-1].bit_length() - 1, tables.shape[2]
    packed = prepare_codes(pack_codes(codes, bits), codes.shape[1], groups, x.dtype)
    return CpuBackend(level).integer_linear(x, packed, *to_integers(tables), slots)


def lanes(level: str, bits: int, steps: int) -> Tensor:
    """``[columns]``: the lane of a register that a column's products are summed in."""
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


def token_scales(x: Tensor, groups: int, bits: int, level: str) -> Tensor:
    """The unit of each token's integers: no smaller than sums of 32 bits allow."""
    size = x.double().abs().reshape(len(x), groups, -1)
    padded = torch.nn.functional.pad(size, (0, -size.shape[2] % _STEP))
    lane = lanes(level, bits, padded.shape[2] // _STEP)
    count = 8 if level == "avx2" else 16
    by_lane = torch.zeros(len(x), count, dtype=torch.float64)
    by_lane.index_add_(1, lane, padded.sum(1))
    # Steps are filled up to whole ones, with AVX2 to whole pairs.
    together = 2 if level == "avx2" else 1
    steps = math.ceil(size.shape[2] / _STEP / together) * together * groups
    rounding = steps * _STEP / count / 2 * LARGEST_ENTRY
    return torch.maximum(
        size.amax((1, 2)) / 32767, by_lane.amax(1) * LARGEST_ENTRY / (_LARGEST_SUM - rounding)
    )


@native
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([(3, 1, 16), (2, 3, 2, 8), (1, 1, 1, 4)]),
    st.integers(-20, 10),
    st.integers(0, 10**6),
)
def test_entries_are_the_nearest_multiples_of_a_rows_scale(
    dtype: torch.dtype, shape: tuple[int, ...], exponent: int, seed: int
) -> None:
    tables = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tables = (tables * 2.0**exponent).to(dtype)
    tables[0] = 0
    values, scales = to_integers(tables)
    assert values.dtype == torch.int16 and values.abs().max() <= LARGEST_ENTRY
    assert scales.shape == tables.shape[:-2] and not scales[0].any() and not values[0].any()
    wrong = (from_integers(values, scales).double() - tables.double()).abs()
    # Half a unit, and what float32 rounds.
    assert (wrong <= 0.501 * scales.double()[..., None, None]).all()


@native
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([(70, 1, 16), (3, 2, 8), (5, 7, 4)]),
    st.sampled_from([-40, -20, 0, 10, 60]),
    st.integers(0, 10**6),
)
def test_integers_are_those_of_the_formula(
    dtype: torch.dtype, shape: tuple[int, ...], exponent: int, seed: int
) -> None:
    """To the bit, of what torch computes one operation after another."""
    tables = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    tables = tables.to(dtype)
    tables[0, 0, 0], tables[1, 0, 0], tables[2, 0, 0] = torch.nan, -torch.inf, 0
    expected = tables.float().abs().amax((-2, -1)) / LARGEST_ENTRY
    usable = (expected > torch.finfo(torch.float32).tiny) & expected.isfinite()
    inverse = torch.where(usable, expected.reciprocal(), 0.0)[:, None, None]
    values, scales = to_integers(tables)
    assert values.equal((tables.float() * inverse).round().nan_to_num(0.0).short())
    kept = torch.where(usable | ~expected.isfinite(), expected, 0.0)
    assert torch.allclose(scales, kept, rtol=0, atol=0, equal_nan=True)


@native
def test_scales_are_float32_whatever_torchs_default_is() -> None:
    """vLLM sets it to the dtype of the activations while it loads a model."""
    tables = torch.randn(5, 1, 4)
    expected = to_integers(tables)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [to_integers(tables), *to_integers_together([tables])]
    finally:
        torch.set_default_dtype(before)
    for values, scales in found:
        assert scales.dtype == torch.float32
        assert values.equal(expected[0]) and scales.equal(expected[1])


@native
def test_several_become_integers_as_each_does_alone() -> None:
    several = [torch.randn(rows, 2, 8).half() for rows in (3, 1, 6)]
    for tables, (values, scales) in zip(several, to_integers_together(several), strict=True):
        alone = to_integers(tables)
        assert values.equal(alone[0]) and scales.equal(alone[1])


@native
def test_rows_that_hold_no_numbers_are_none_and_others_are() -> None:
    tables = torch.ones(4, 1, 4)
    tables[1, 0, 2], tables[2, 0, 0] = torch.nan, torch.inf
    tables[3] = 1e-42
    values, scales = to_integers(tables)
    assert scales.isfinite().tolist() == [True, False, False, True]
    assert values.abs().max() <= LARGEST_ENTRY
    assert from_integers(values, scales)[0].tolist() == tables[0].tolist()


@some
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(_LEVELS or [""]),
    st.sampled_from([2, 3, 4]),
    st.integers(1, 3),
    st.one_of(st.integers(1, 40), st.sampled_from([64, 300, 1024, 2500])),
    st.integers(1, 20),
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_products_are_within_the_rounding_of_both_factors(
    level: str, bits: int, groups: int, width: int, rows: int, slots: list[int],
    dtype: torch.dtype, outliers: bool, seed: int,
) -> None:  # fmt: skip
    codes, tables = layer(rows, groups * width, bits, groups, 5, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(slots), groups * width, generator=generator)
    if outliers:
        x[:, 0] *= 100
    x = x.to(dtype)
    y = multiply(x, codes, tables, torch.tensor(slots, dtype=torch.int32), level)
    assert y.dtype == dtype
    weights = dense(codes, from_integers(*to_integers(tables)))[slots]
    expected = torch.einsum("tc,trc->tr", x.double(), weights)
    unit = token_scales(x, groups, bits, level)[:, None]
    size = torch.einsum("tc,trc->tr", x.double().abs(), weights.abs())
    bound = 0.501 * unit * weights.abs().sum(2) + 1e-6 * size
    rounding = torch.finfo(dtype)
    bound += rounding.eps * (expected.abs() + rounding.smallest_normal)
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("level", _LEVELS)
@pytest.mark.parametrize("columns", [32, 576, 11008, 400_000])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sums_as_large_as_they_can_be_do_not_overflow(bits: int, columns: int, level: str) -> None:
    """All products of one sign and size: activations of many columns get fewer bits for it."""
    codes = torch.zeros(3, columns, dtype=torch.uint8)
    tables = torch.full((1, 3, 1, 1 << bits), -1.0)
    x = torch.ones(5, columns)
    x[1] = -1
    x[2, columns // 2 :] = 0
    x[3] = 0
    x[3, 7] = 1e4
    if columns < 40_000:  # all else of the widest would be rounded away
        x[4, ::_STEP] = 100.0  # in one lane only
    expected = x.double() @ dense(codes, tables)[0].T
    y = multiply(x, codes, tables, None, level)
    bound = 0.501 * token_scales(x, 1, bits, level)[:, None] * x.count_nonzero(1)[:, None]
    assert (bound <= 0.06 * expected.abs()).all()
    assert ((y.double() - expected).abs() <= bound + 1e-6 * expected.abs()).all()


@pytest.mark.parametrize("level", _LEVELS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_token_has_the_same_product_whatever_others_there_are(bits: int, level: str) -> None:
    codes, tables = layer(21, 600, bits, 1, 4, 0)
    x = torch.randn(17, 600, generator=torch.Generator().manual_seed(1))
    slots = torch.arange(17, dtype=torch.int32) % 4
    together = multiply(x, codes, tables, slots, level)
    for token in range(17):
        slot = int(slots[token])
        alone = multiply(x[token : token + 1], codes, tables[slot : slot + 1], None, level)
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("level", _LEVELS)
def test_activations_that_are_no_numbers_or_nothing(level: str) -> None:
    codes, tables = layer(4, 64, 4, 2, 1, 0)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    usual = multiply(x, codes, tables, None, level)
    x[1, 3], x[2, 63], x[3] = torch.nan, -torch.inf, 0
    x[4] *= 1e-37
    x[5] *= 1e30
    x[6] *= 1e36
    x[7] *= 1e38
    y = multiply(x, codes, tables, None, level)
    assert torch.equal(y[0], usual[0])
    assert y[1:3].isnan().all()
    assert not y[3].any() and y[4].abs().max() < 1e-35
    for token, factor in ((5, 1e30), (6, 1e36)):
        torch.testing.assert_close(y[token] / factor, usual[token], rtol=1e-3, atol=1e-3)
    # Beyond what float32 adds: right or no number, never another one.
    wrong = (y[7] / 1e38 - usual[7]).abs() > 1e-2
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
    with pytest.raises(ValueError, match="codes"):
        CpuBackend().integer_linear(x[:, :32].contiguous(), packed, *to_integers(tables), None)
    with pytest.raises(ValueError, match="float64"):
        CpuBackend().integer_linear(x.double(), packed, *to_integers(tables), None)


@best
def test_held_tables_are_integers_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tables = layer(6, 32, 3, 2, 1, 0)
    monkeypatch.setenv(INTEGERS_VARIABLE, "1")
    held = HeldTables.of(tables[0], 3, torch.float32)
    assert held.entries.shape == (3, 6, 2, 8) and held.entries.dtype == torch.int16
    assert held.slot_bytes == 6 * 2 * 8 * 2 + 6 * 4
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
    monkeypatch.setenv(INTEGERS_VARIABLE, "1")
    assert not holds_integers("cuda", torch.float32)
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    with pytest.raises(ValueError, match="reference has no integers"):
        holds_integers("cpu", torch.float32)


@native
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("faster", [False, True])
def test_integers_are_held_where_they_are_multiplied_faster(
    faster: bool, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the dtype of the activations has no instructions of its own."""
    monkeypatch.delenv(INTEGERS_VARIABLE, raising=False)
    monkeypatch.setattr(choice, "why_no_integers", lambda level: None if faster else "none")
    monkeypatch.setattr(CpuBackend, "rounds_tables", lambda self, dtype: rounds)
    assert holds_integers("cpu", torch.bfloat16) == (faster and not rounds)
    monkeypatch.setenv(INTEGERS_VARIABLE, "0")
    assert not holds_integers("cpu", torch.bfloat16)


@native
def test_a_processor_without_instructions_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    none = SimpleNamespace(spallm_cpu_integers=lambda level: ctypes.c_int32(0).value)
    monkeypatch.setattr(integers, "library", lambda: none)
    monkeypatch.delenv(INTEGERS_VARIABLE, raising=False)
    assert not holds_integers("cpu", torch.float32)
    monkeypatch.setenv(INTEGERS_VARIABLE, "1")
    with pytest.raises(ValueError, match="SPALLM_CPU_INTEGERS=1: there are no faster products"):
        holds_integers("cpu", torch.float32)
    monkeypatch.setenv(INTEGERS_VARIABLE, "yes")
    with pytest.raises(ValueError, match="SPALLM_CPU_INTEGERS='yes': expected 0 or 1"):
        holds_integers("cpu", torch.float32)


@native
def test_instructions_without_products_of_integers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes, tables = layer(4, 64, 4, 1, 1, 0)
    with pytest.raises(ValueError, match="no products of integers with scalar"):
        multiply(torch.zeros(1, 64), codes, tables, None, "scalar")
    monkeypatch.setenv(FORCE_VARIABLE, "cpu-scalar")
    assert HeldTables.of(tables[0], 2, torch.float32).scales is None
    monkeypatch.setenv(INTEGERS_VARIABLE, "1")
    with pytest.raises(ValueError, match="there are no faster products of integers with scalar"):
        HeldTables.of(tables[0], 2, torch.float32)
