"""Products with blocks and their gradients against a dense weight in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spallm_serve.trainer.smt.ops import BlockLayout, block_delta
from tests.spallm_serve.trainer.smt_models import scattered


@dataclass
class Case:
    """Operands; ``index`` in no order."""

    x: Tensor
    y: Tensor
    blocks: Tensor
    index: Tensor

    def apply(self) -> Tensor:
        layout = BlockLayout.of(self.index, self.blocks.shape[1])
        return block_delta(self.y, self.x, self.blocks, layout)


def make_case(
    rows: int = 11,
    columns: int = 13,
    size: int = 4,
    tokens: int = 5,
    count: int = 5,
    dtype: torch.dtype = torch.float32,
    master: torch.dtype = torch.float32,
) -> Case:
    grid = -(-rows // size), -(-columns // size)
    places = torch.randperm(grid[0] * grid[1])[:count]
    index = torch.stack([places // grid[1], places % grid[1]], 1).int()
    return Case(
        torch.randn(tokens, columns).to(dtype),
        torch.randn(tokens, rows).to(dtype),
        torch.randn(len(index), size, size, dtype=master),
        index,
    )


cases = st.builds(
    make_case,
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    size=st.integers(1, 12),
    tokens=st.integers(0, 6),
    count=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
# Of a sum of magnitudes: in bfloat16 the blocks, the sum and what is added to are rounded.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float64: 1e-14}


def close(found: Tensor, wanted: Tensor, size: Tensor, tolerance: float) -> None:
    assert bool(((found.double() - wanted).abs() <= tolerance * size + 1e-30).all())


@settings(max_examples=100, deadline=None)
@given(case=cases)
def test_is_the_dense_product_and_gradient(case: Case) -> None:
    for leaf in (case.x, case.y, case.blocks):
        leaf.requires_grad_()
    seed = torch.randn_like(case.y)
    out = case.apply()
    out.backward(seed)
    assert out.dtype == case.y.dtype
    x, y, blocks = (t.detach().double() for t in (case.x, case.y, case.blocks))
    blocks.requires_grad_()
    dense = scattered(blocks, case.index, y.shape[1], x.shape[1])
    dense.backward(seed.double().T @ x)
    dense, dy, tolerance = dense.detach(), seed.double(), TOLERANCE[case.x.dtype]
    assert case.x.grad is not None and case.y.grad is not None and case.blocks.grad is not None
    close(out, y + x @ dense.T, y.abs() + x.abs() @ dense.abs().T, tolerance)
    assert torch.equal(case.y.grad, seed)
    close(case.x.grad, dy @ dense, dy.abs() @ dense.abs(), tolerance)
    assert case.blocks.grad.dtype == torch.float32
    # What is below is exact products summed in float32, whatever the activations are.
    assert blocks.grad is not None
    torch.testing.assert_close(case.blocks.grad.double(), blocks.grad, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    case = make_case(dtype=torch.float64, master=torch.float64)
    layout = BlockLayout.of(case.index, 4)
    leaves = [t.requires_grad_() for t in (case.y, case.x, case.blocks)]
    assert torch.autograd.gradcheck(lambda y, x, b: block_delta(y, x, b, layout), leaves)


def test_what_lies_beyond_an_edge_counts_for_nothing() -> None:
    case = make_case(rows=5, columns=6, size=4, count=4)
    wanted = case.apply()
    beyond = torch.ones(8, 8, dtype=torch.bool)
    beyond[:5, :6] = False
    case.blocks.requires_grad_()
    for number, (row, column) in enumerate(case.index.tolist()):
        outside = beyond[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        with torch.no_grad():
            case.blocks[number][outside] = 1e30
    out = case.apply()
    assert torch.equal(out, wanted)
    out.square().sum().backward()
    assert case.blocks.grad is not None
    for number, (row, column) in enumerate(case.index.tolist()):
        outside = beyond[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert not case.blocks.grad[number][outside].any()
        assert bool(case.blocks.grad[number][~outside].all())


def test_leading_dimensions_and_strides_of_all_kinds() -> None:
    case = make_case(tokens=6)
    wanted = case.apply()
    x = case.x.view(2, 3, 13).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y = case.y.T.contiguous().T.view(2, 3, 11)
    assert not x.is_contiguous() and not y.is_contiguous()
    before = y.clone()
    out = block_delta(y, x, case.blocks, BlockLayout.of(case.index, 4))
    assert torch.equal(out.view(6, 11), wanted)
    assert torch.equal(y, before)
    out.sum().backward()  # an expanded gradient
    assert x.grad is not None and x.grad.shape == x.shape


def kept(case: Case) -> list[Tensor]:
    """What is kept for the backward pass, less the blocks themselves."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        case.apply()
    return [tensor for tensor in tensors if tensor.data_ptr() != case.blocks.data_ptr()]


@pytest.mark.parametrize("columns", [64, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_copies_of_the_columns_needed_are_kept(columns: int, dtype: torch.dtype) -> None:
    case = make_case(rows=16, columns=columns, tokens=10, dtype=dtype)
    case.index = torch.tensor([[0, 2], [1, 15], [3, 2]], dtype=torch.int32)
    case.blocks = torch.zeros(3, 4, 4, requires_grad=True)
    case.x.requires_grad_()
    (copy,) = kept(case)
    assert copy.untyped_storage().nbytes() == 10 * 4 * 2 * dtype.itemsize
    assert copy.untyped_storage().data_ptr() != case.x.untyped_storage().data_ptr()
    columns_kept = torch.zeros(10, 8, dtype=dtype)
    columns_kept[:, :4] = case.x.detach()[:, 8:12]
    columns_kept[:, 4 : 4 + columns - 60] = case.x.detach()[:, 60:]
    assert torch.equal(copy.flatten(1), columns_kept)


def test_nothing_is_kept_where_blocks_take_no_gradient() -> None:
    case = make_case()
    case.x.requires_grad_()
    assert kept(case) == []


@pytest.mark.parametrize("count", [1, 6, 16])
def test_the_operations_are_those_of_the_blocks(count: int) -> None:
    case = make_case(rows=16, columns=16, size=4, tokens=8, count=count)
    case.blocks.requires_grad_()
    one = 2 * 8 * 4 * 4 * count
    for wants_x in (False, True):
        case.x.requires_grad_(wants_x)
        with FlopCounterMode(display=False) as forward:
            out = case.apply()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert forward.get_total_flops() == one
        assert backward.get_total_flops() == (2 * one if wants_x else one)


def test_many_tokens_in_bfloat16_are_summed_in_float32() -> None:
    case = make_case(rows=4, columns=4, count=1, tokens=4096, dtype=torch.bfloat16)
    case.x.fill_(1.0)
    case.blocks.requires_grad_()
    case.apply().sum().backward()
    assert case.blocks.grad is not None
    assert bool((case.blocks.grad == 4096).all())
