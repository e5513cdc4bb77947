"""The operation as torch sees it: operator, tracing, what is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from spallm_serve.kernels import dispatch, lut_linear
from tests.kernels.cases import (
    Case,
    make_case,
    prepared,
)


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


def test_fake_tensors_meet_the_fake_operator() -> None:
    case = make_case(4)
    codes = prepared(case)
    with FakeTensorMode() as mode:
        x, fake_codes, tables = (mode.from_tensor(t) for t in (case.x, codes, case.tables))
        y = lut_linear(x, fake_codes, tables)
    assert y.shape == (len(case.x), case.tables.shape[1])
