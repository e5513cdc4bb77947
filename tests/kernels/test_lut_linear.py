"""The operation on every backend against a dense matmul in float64, and its bad input."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spallm_serve.kernels import choice, dispatch, explain, lut_linear, prepare_codes
from spallm_serve.kernels.choice import FORCE_VARIABLE
from spallm_serve.kernels.cpu import backend as cpu_backend
from spallm_serve.kernels.cpu import library as native
from spallm_serve.kernels.cpu.backend import CpuBackend
from spallm_serve.kernels.cpu.library import LEVELS, best_level, library
from spallm_serve.kernels.native import NativeLibraryError
from spallm_serve.kernels.packing import pack_codes
from spallm_serve.kernels.reference import dequantize
from spallm_serve.kernels.reference_backend import ReferenceBackend

BACKENDS = ("reference", *(f"cpu-{level}" for level in LEVELS), "triton")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """One multiplication with its operands; ``weights`` are those of each slot in float64."""

    x: Tensor
    planes: Tensor
    tables: Tensor
    slots: Tensor | None
    bias: Tensor | None
    codes: Tensor
    weights: Tensor

    def wanted(self) -> tuple[Tensor, Tensor]:
        """The product in float64, and the sum of its terms' magnitudes to compare errors with."""
        slots = torch.zeros(len(self.x), dtype=torch.long) if self.slots is None else self.slots
        chosen, x = self.weights[slots.long()], self.x.detach().double()
        bias = torch.zeros(chosen.shape[1]) if self.bias is None else self.bias.detach()
        return (
            torch.einsum("trc,tc->tr", chosen, x) + bias,
            torch.einsum("trc,tc->tr", chosen.abs(), x.abs()) + bias.abs(),
        )


def make_case(
    bits: int,
    *,
    rows: int = 5,
    width: int = 37,
    groups: int = 2,
    tokens: int = 6,
    n_slots: int | None = 3,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
) -> Case:
    columns = groups * width
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    tables = torch.randn(n_slots or 1, rows, groups, 1 << bits).to(table_dtype)
    return Case(
        torch.randn(tokens, columns).to(dtype),
        pack_codes(codes, bits),
        tables,
        None if n_slots is None else torch.randint(0, n_slots, (tokens,), dtype=torch.int32),
        torch.randn(rows) if bias else None,
        codes,
        torch.stack([dequantize(codes, table) for table in tables.double()]),
    )


def force(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name.startswith("cpu-"):
        try:
            best = best_level()
        except NativeLibraryError as error:
            pytest.skip(str(error))
        if LEVELS.index(name.removeprefix("cpu-")) > best:
            pytest.skip(f"this processor has no {name.removeprefix('cpu-')}")
    if name == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            # Compiled, not interpreted: everything a test makes from here on lies on the GPU.
            torch.set_default_device("cuda")
    monkeypatch.setenv(FORCE_VARIABLE, name)


@pytest.fixture(autouse=True)
def restored_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)


def skip_where_slots_go_unread() -> None:
    if torch.get_default_device().type == "cuda":
        pytest.skip("a GPU would have to be waited for: such tokens get NaN, see test_gpu.py")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(monkeypatch, request.param)
    return str(request.param)


def prepared(case: Case) -> Tensor:
    return prepare_codes(case.planes, case.x.shape[1], case.tables.shape[2], case.x.dtype)


def assert_right(case: Case) -> None:
    y = lut_linear(case.x, prepared(case), case.tables, case.slots, case.bias)
    wanted, size = case.wanted()
    assert y.dtype == case.x.dtype
    assert y.shape == wanted.shape
    assert bool(((y.double() - wanted).abs() <= TOLERANCE[case.x.dtype] * size + 1e-30).all())


cases = st.builds(
    make_case,
    st.sampled_from([2, 3, 4]),
    rows=st.integers(1, 20),
    width=st.one_of(st.integers(1, 70), st.sampled_from([128, 512, 576, 1100])),
    groups=st.integers(1, 8),
    tokens=st.one_of(st.integers(0, 20), st.sampled_from([79, 80, 130])),
    n_slots=st.one_of(st.none(), st.integers(1, 20)),
    bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    table_dtype=st.sampled_from(list(TOLERANCE)),
)


@pytest.mark.parametrize("name", BACKENDS)
def test_is_the_dense_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, name)

    # The interpreter takes a second for a large one.
    @settings(max_examples=25 if name == "triton" else 60, deadline=None)
    @given(case=cases)
    def check(case: Case) -> None:
        assert_right(case)

    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["cpu-scalar", "cpu-avx2", "cpu-avx512"])
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


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


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


def test_is_a_proper_operator(backend: str) -> None:
    case = make_case(3, tokens=4)
    codes, dy = prepared(case), torch.randn(4, 5)
    operators, check = torch.ops.spallm, torch.library.opcheck
    check(operators.input_gradient.default, (dy, codes, case.tables, case.slots, 74))
    check(operators.table_gradient.default, (dy, case.x, codes, case.tables, case.slots))
    case.x.requires_grad_()
    case.tables.requires_grad_()
    check(operators.lut_linear.default, (case.x, codes, case.tables, case.slots, case.bias))


def keeps_x(case: Case, trained: str, *, compiled: bool = False) -> bool:
    """Whether a product with one leaf to train keeps the memory of its activations."""
    codes, leaf = prepared(case), getattr(case, trained).requires_grad_()
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    multiply = torch.compile(lut_linear, backend="aot_eager") if compiled else lut_linear
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = multiply(case.x, codes, case.tables, case.slots, case.bias)
    y.sum().backward()
    assert leaf.grad is not None
    return case.x.data_ptr() in kept


@pytest.mark.parametrize("trained", ["x", "tables", "bias"])
def test_activations_are_kept_only_for_the_gradient_of_tables(trained: str, backend: str) -> None:
    assert keeps_x(make_case(3), trained) == (trained == "tables")


@pytest.mark.parametrize("trained", ["x", "tables"])
def test_a_compiled_product_keeps_no_more(trained: str) -> None:
    assert keeps_x(make_case(3), trained, compiled=True) == (trained == "tables")


def test_compiles_in_one_graph() -> None:
    case = make_case(4, tokens=4)
    codes = prepared(case)

    def step(x: Tensor) -> Tensor:
        return lut_linear(x, codes, case.tables, case.slots, case.bias).relu()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.x), step(case.x))


def test_without_a_native_library_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> int:
        raise NativeLibraryError("not built, says the test")

    monkeypatch.delenv(FORCE_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu_backend, "best_level", absent)
    assert str(explain("cpu")) == (
        "reference; not cpu: not built, says the test; not triton: the tensors are on cpu"
    )
    assert_right(make_case(4))


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale build lacks a function or two; it must not be called on trust."""
    try:
        library()
    except NativeLibraryError as error:
        pytest.skip(str(error))
    monkeypatch.setitem(native._FUNCTIONS, "spallm_of_tomorrow", (None, ()))
    library.cache_clear()
    try:
        with pytest.raises(NativeLibraryError, match=r"spallm_of_tomorrow.*install this package"):
            library()
    finally:
        library.cache_clear()


def test_the_choice_is_explained_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert explain("cuda", torch.float64).backend == "reference"
    assert "cuda" in explain("cuda", torch.float64).refused["cpu"]
    assert "float64" in str(explain("cpu", torch.float64))
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert str(explain("cpu")) == "reference (by SPALLM_KERNEL)"
    choice._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            prepared(make_case(2))
    assert [record.getMessage() for record in caplog.records] == [
        "lut_linear runs on reference (by SPALLM_KERNEL)"
    ]
    monkeypatch.setenv(FORCE_VARIABLE, "cpu-scalar")
    with pytest.raises(ValueError, match="cpu-scalar cannot serve"):
        explain("cuda")
    monkeypatch.setenv(FORCE_VARIABLE, "cuda-magic")
    with pytest.raises(ValueError, match=r"cuda-magic.*expected one of cpu, triton, reference"):
        explain("cpu")


BAD = {
    "x of integers": ({"x": torch.ones(6, 74, dtype=torch.int32)}, "x: expected floating point"),
    "x of three dimensions": ({"x": torch.ones(1, 6, 74)}, r"x: expected .*\[1, 6, 74\]"),
    "x not contiguous": ({"x": torch.ones(74, 6).T}, "x: expected contiguous"),
    "x of another width": ({"x": torch.ones(6, 700)}, "codes: expected"),
    "x on another device": ({"x": torch.ones(6, 74, device="meta")}, "on meta"),
    "tables of three dimensions": ({"tables": torch.ones(5, 2, 16)}, "tables: expected"),
    "tables of other rows": ({"tables": torch.ones(3, 4, 2, 16)}, "tables: .* 5 rows"),
    "tables without a slot": ({"tables": torch.ones(0, 5, 2, 16)}, "tables: .*at least one"),
    "tables of other bits": ({"tables": torch.ones(3, 5, 2, 4)}, "codes: .* 4"),
    "tables of 32 entries": ({"tables": torch.ones(3, 5, 2, 32)}, "tables: expected 4, 8 or 16"),
    "tables of 12 entries": ({"tables": torch.ones(3, 5, 2, 12)}, "tables: expected 4, 8 or 16"),
    "tables of other groups": ({"tables": torch.ones(3, 5, 3, 16)}, "tables: .*divides"),
    "tables not contiguous": (
        {"tables": torch.ones(3, 5, 16, 2).transpose(2, 3)}, "tables: expected contiguous",
    ),
    "tables of integers": ({"tables": torch.ones(3, 5, 2, 16).int()}, "tables: expected floating"),
    "slots of int64": ({"slots": torch.zeros(6, dtype=torch.int64)}, "slots: expected int32"),
    "slots of float32": ({"slots": torch.zeros(6)}, "slots: expected int32"),
    "slots of uint32": ({"slots": torch.zeros(6, dtype=torch.uint32)}, "slots: expected int32"),
    "slots of other tokens": ({"slots": torch.zeros(5, dtype=torch.int32)}, r"int32 \[6\]"),
    "slots above": ({"slots": torch.tensor([0, 1, 2, 3, 0, 0]).int()}, "got 3 for token 3"),
    "slots below": ({"slots": torch.tensor([0, -1, 2, 0, 0, 0]).int()}, "got -1 for token 1"),
    "bias of other rows": ({"bias": torch.ones(6)}, r"bias: expected floating point \[5\]"),
    "bias of integers": ({"bias": torch.ones(5).int()}, "bias: expected floating"),
    "codes of floats": ({"codes": torch.ones(5, 64)}, "codes: expected"),
    "codes of one dimension": ({"codes": torch.ones(5).byte()}, "codes: expected"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad: str, backend: str) -> None:
    case = make_case(4)
    given = {
        "x": case.x, "codes": prepared(case), "tables": case.tables, "slots": case.slots,
        "bias": case.bias,
    }  # fmt: skip
    change, message = BAD[bad]
    if bad in ("slots above", "slots below"):
        skip_where_slots_go_unread()
    change = {
        name: value if value.is_meta else value.to(case.x.device) for name, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        lut_linear(**(given | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [6, 100])
@pytest.mark.parametrize("other", [(5, 1, 16), (5, 2, 8)])
def test_codes_laid_out_for_other_tables_are_refused(
    tokens: int, other: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they happen to take as many bytes, only what the codes say of themselves tells."""
    force(monkeypatch, f"cpu-{LEVELS[0]}")
    case = make_case(4, width=16, tokens=tokens)
    with pytest.raises(ValueError, match="codes: "):
        lut_linear(case.x, prepared(case), torch.ones(3, *other), case.slots)


@pytest.mark.parametrize("tokens", [6, 100])
def test_a_slot_out_of_range_is_refused_however_many_tokens(tokens: int, backend: str) -> None:
    skip_where_slots_go_unread()
    case = make_case(4, tokens=tokens)
    assert case.slots is not None
    case.slots[tokens - 1] = 7
    with pytest.raises(ValueError, match=f"expected 0 to 2 .* got 7 for token {tokens - 1}"):
        lut_linear(case.x, prepared(case), case.tables, case.slots)


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


def test_dispatch_without_gradients_skips_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("went through the operator")

    case = make_case(2)
    codes = prepared(case)
    monkeypatch.setattr(dispatch.torch.ops.spallm, "lut_linear", never)
    lut_linear(case.x, codes, case.tables)


def test_a_counter_of_operations_sees_the_operator_without_gradients(backend: str) -> None:
    case = make_case(2)
    codes = prepared(case)
    seen: list[tuple[int, ...]] = []

    def formula(x: tuple[int, ...], *_: object, out_shape: tuple[int, ...], **__: object) -> int:
        seen.append(x)
        return 2 * x[0] * x[1] * out_shape[1]

    operator = torch.ops.spallm.lut_linear
    counter = FlopCounterMode(display=False, custom_mapping={operator: formula})
    with counter, torch.no_grad():
        y = lut_linear(case.x, codes, case.tables, case.slots, case.bias)
    assert seen == [(6, 74)]
    assert counter.get_flop_counts()["Global"] == {operator: 2 * 6 * 74 * 5}
    torch.testing.assert_close(
        y, lut_linear(case.x, codes, case.tables, case.slots, case.bias), rtol=0, atol=0
    )


def test_codes_for_the_cpu_are_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, f"cpu-{LEVELS[0]}")
    case = make_case(4, n_slots=None)
    codes = prepared(case)
    with pytest.raises(ValueError, match="codes: are laid out for the CPU, got on meta"):
        lut_linear(case.x.to("meta"), codes.to("meta"), case.tables.to("meta"))


@pytest.mark.parametrize("groups", [-1, 0, 3])
def test_groups_that_do_not_divide_are_refused(backend: str, groups: int) -> None:
    case = make_case(4, width=64, groups=1)
    with pytest.raises(ValueError, match="groups: expected a divisor of 64 columns"):
        prepare_codes(case.planes, 64, groups)


def test_no_columns_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="columns: expected at least 1"):
        prepare_codes(torch.zeros(4, 16, 0, dtype=torch.uint8), 0, 1)


def test_table_gradients_beyond_float16(backend: str) -> None:
    case = make_case(2, rows=4, width=32, groups=1, tokens=512, n_slots=None, dtype=torch.float16)
    x = torch.full_like(case.x, 20.0)
    codes = prepare_codes(case.planes, 32, 1, torch.float16)
    dy = torch.full((512, 4), 20.0, dtype=torch.float16)
    found = torch.ops.spallm.table_gradient(dy, x, codes, case.tables, None)
    counts = torch.nn.functional.one_hot(case.codes.long(), 4).sum(1).float()
    torch.testing.assert_close(found[0, :, 0], counts * 512 * 400)


def test_explains_why_cuda_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("it does here")
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert explain("cuda").refused["triton"] == "torch sees no GPU"


def test_fake_tensors_meet_the_fake_operator() -> None:
    case = make_case(4)
    codes = prepared(case)
    with FakeTensorMode() as mode:
        x, fake_codes, tables = (mode.from_tensor(t) for t in (case.x, codes, case.tables))
        y = lut_linear(x, fake_codes, tables)
    assert y.shape == (len(case.x), case.tables.shape[1])
