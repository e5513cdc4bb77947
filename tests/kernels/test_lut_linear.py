"""The operation on every backend against a dense matmul in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spallm_serve.kernels import lut_linear, prepare_codes
from spallm_serve.kernels.cpu import backend as cpu_backend
from spallm_serve.kernels.cpu.backend import CpuBackend
from spallm_serve.kernels.cpu.library import LEVELS
from spallm_serve.kernels.packing import pack_codes
from spallm_serve.kernels.reference import dequantize
from spallm_serve.kernels.reference_backend import ReferenceBackend
from tests.kernels.cases import (
    BACKENDS,
    TOLERANCE,
    Case,
    assert_right,
    force,
    make_case,
    prepared,
)


def cases(name: str) -> st.SearchStrategy[Case]:
    # The interpreter takes up to ten seconds for the largest.
    few = name == "triton"
    widths, tokens = [128, 512, 576, 1100], [79, 80, 130]
    return st.builds(
        make_case,
        st.sampled_from([2, 3, 4]),
        rows=st.integers(1, 20),
        width=st.one_of(st.integers(1, 70), st.sampled_from(widths[:2] if few else widths)),
        groups=st.integers(1, 2 if few else 8),
        tokens=st.one_of(st.integers(0, 20), st.sampled_from(tokens[:1] if few else tokens)),
        n_slots=st.one_of(st.none(), st.integers(1, 6 if few else 20)),
        bias=st.booleans(),
        dtype=st.sampled_from(list(TOLERANCE)),
        table_dtype=st.sampled_from(list(TOLERANCE)),
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_is_the_dense_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, name)

    @settings(max_examples=12 if name == "triton" else 60, deadline=None)
    @given(case=cases(name))
    def check(case: Case) -> None:
        assert_right(case)

    check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [f"cpu-{level}" for level in LEVELS])
def test_what_is_no_number_stays_with_its_token(
    name: str, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, name)
    for tokens in (2, 5, 11):
        for n_slots in (None, 3):
            case = make_case(3, rows=7, tokens=tokens, n_slots=n_slots, dtype=dtype)
            codes = prepared(case)
            before = lut_linear(case.x, codes, case.tables, case.slots, case.bias)
            case.x[1, 4] = value
            after = lut_linear(case.x, codes, case.tables, case.slots, case.bias)
            assert not after[1].isfinite().any()
            others = [token for token in range(tokens) if token != 1]
            assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [f"cpu-{level}" for level in LEVELS])
def test_a_token_does_not_see_who_it_is_with(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and in any mixture of slots it has the same output, to the bit."""
    force(monkeypatch, name)
    invariant = cpu_backend.INVARIANT_VARIABLE

    @settings(deadline=None, max_examples=60)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        bits, rows = data.draw(st.sampled_from([2, 3, 4])), data.draw(st.integers(1, 20))
        half = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([288, 550])))
        all_of_them = data.draw(st.booleans())
        monkeypatch.setenv(invariant, "1" if all_of_them else "0")
        tokens = data.draw(st.integers(1, 200 if all_of_them else cpu_backend.BLAS_TOKENS - 1))
        # Both halves of a sum cancel: what is left is rounding, which the order decides.
        codes = torch.randint(0, 1 << bits, (rows, half), dtype=torch.uint8).repeat(1, 2)
        x = torch.randn(tokens, half)
        x = torch.cat([x, -x], dim=1).to(dtype)
        tables = torch.randn(9, rows, 1, 1 << bits).half()
        slots = torch.randint(0, data.draw(st.integers(1, 9)), (tokens,), dtype=torch.int32)
        planes = prepare_codes(pack_codes(codes, bits), 2 * half, 1, dtype)
        together = lut_linear(x, planes, tables, slots)
        first = data.draw(st.integers(0, tokens - 1))
        for count in (1, data.draw(st.integers(1, tokens - first))):
            part = slice(first, first + count)
            assert torch.equal(lut_linear(x[part], planes, tables, slots[part]), together[part])

    check()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("groups", "width"), [(1, 4001), (3, 1399), (9, 700), (40, 101)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [f"cpu-{level}" for level in LEVELS])
def test_wide_layers_are_multiplied_in_spans(
    name: str,
    dtype: torch.dtype,
    groups: int,
    width: int,
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Activations do not fit the first cache; a span may end within a group. To the bit what one
    token alone has, which takes no spans."""
    force(monkeypatch, name)
    for tokens in (3, 8, 11):
        case = make_case(
            bits, rows=37, width=width, groups=groups, tokens=tokens, n_slots=None, dtype=dtype
        )
        assert_right(case)
        codes = prepared(case)
        together = lut_linear(case.x, codes, case.tables)
        for token in range(tokens):
            alone = lut_linear(case.x[token : token + 1], codes, case.tables)
            assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("tokens", [1, 9, 100])
@pytest.mark.parametrize("name", [f"cpu-{level}" for level in LEVELS])
def test_threads_share_out_rows(
    name: str, tokens: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer that is large enough for all of them to have some."""
    force(monkeypatch, name)
    case = make_case(4, rows=700, width=256, tokens=tokens)
    assert_right(case)
    dy = torch.randn(tokens, 700)
    found = torch.ops.spallm.table_gradient(dy, case.x, prepared(case), case.tables, case.slots)
    given = (dy, case.x, case.planes, case.tables, case.slots)
    expected = ReferenceBackend().table_gradient(*given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_of_every_lane(bits: int, backend: str) -> None:
    """Each column in turn holds each code, the top one too, while the others hold another."""
    columns, entries = 70, 1 << bits
    tables = torch.tensor([[[10.0**k for k in range(entries)]]]).expand(1, columns, 1, entries)
    x = torch.eye(columns)
    for code in range(entries):
        codes = torch.full((columns, columns), (code + 1) % entries, dtype=torch.uint8)
        codes.fill_diagonal_(code)
        packed = prepare_codes(pack_codes(codes, bits), columns, 1, torch.float32)
        y = lut_linear(x, packed, tables.contiguous())
        assert torch.equal(y.T, dequantize(codes, tables[0]))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("n_slots", [None, 3])
@pytest.mark.parametrize("tokens", [0, 1, 7, 60])
def test_gradients(bits: int, n_slots: int | None, tokens: int, backend: str) -> None:
    case = make_case(bits, rows=11, tokens=tokens, n_slots=n_slots)
    leaves = [case.x, case.tables, case.bias]
    assert case.bias is not None
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    seed = torch.randn(tokens, 11)
    lut_linear(case.x, prepared(case), case.tables, case.slots, case.bias).backward(seed)

    dense = case.tables.detach().double().requires_grad_()
    x = case.x.detach().double().requires_grad_()
    slots = torch.zeros(tokens, dtype=torch.long) if case.slots is None else case.slots.long()
    weights = torch.stack([dequantize(case.codes, table) for table in dense])
    torch.einsum("trc,tc->tr", weights[slots], x).backward(seed.double())
    assert case.x.grad is not None and case.tables.grad is not None and x.grad is not None
    torch.testing.assert_close(case.x.grad.double(), x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(case.tables.grad.double(), dense.grad, rtol=1e-4, atol=1e-4)
    assert case.bias.grad is not None
    torch.testing.assert_close(case.bias.grad, seed.sum(0))


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Memory for outputs comes poisoned, so that a forgotten element shows."""
    for name in ("new_empty", "empty"):
        owner = Tensor if name == "new_empty" else torch
        original = getattr(owner, name)

        def poisoned(*args: object, _make: object = original, **kwargs: object) -> Tensor:
            made: Tensor = _make(*args, **kwargs)  # type: ignore[operator]
            return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(255)

        monkeypatch.setattr(owner, name, poisoned)
    for tokens in (1, 9, 100):
        assert_right(make_case(3, rows=33, tokens=tokens, dtype=torch.bfloat16))


@pytest.mark.parametrize("tile_rows", [1, 50, 100, 1000])
def test_many_tokens_are_multiplied_tile_by_tile(
    tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, f"cpu-{LEVELS[0]}")
    monkeypatch.setattr(cpu_backend, "TILE_WEIGHTS", tile_rows * 40)
    assert_right(make_case(4, rows=150, width=20, groups=2, tokens=300, n_slots=2))
    case = make_case(3, rows=150, width=20, groups=2, tokens=90, n_slots=2)
    dy = torch.randn(90, 150)
    found = CpuBackend("scalar").input_gradient(dy, prepared(case), case.tables, case.slots, 40)
    assert case.slots is not None
    wanted = torch.stack(
        [row.double() @ case.weights[slot] for row, slot in zip(dy, case.slots, strict=True)]
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_table_gradient_never_forms_a_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, f"cpu-{LEVELS[0]}")
    monkeypatch.setattr(cpu_backend, "GRADIENT_TILE_WEIGHTS", (74 * 2, 74 * 2))
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and "mm" in str(func):
                sizes.append(found.numel())
            return found

    case = make_case(4, n_slots=None)
    codes = prepared(case)
    with Watch():
        CpuBackend("scalar").table_gradient(torch.ones(6, 5), case.x, codes, case.tables, None)
    assert sizes == [2 * 74, 2 * 74, 74]


def test_table_gradients_beyond_float16(backend: str) -> None:
    case = make_case(2, rows=4, width=32, groups=1, tokens=512, n_slots=None, dtype=torch.float16)
    x = torch.full_like(case.x, 20.0)
    codes = prepare_codes(case.planes, 32, 1, torch.float16)
    dy = torch.full((512, 4), 20.0, dtype=torch.float16)
    found = torch.ops.spallm.table_gradient(dy, x, codes, case.tables, None)
    counts = torch.nn.functional.one_hot(case.codes.long(), 4).sum(1).float()
    torch.testing.assert_close(found[0, :, 0], counts * 512 * 400)
