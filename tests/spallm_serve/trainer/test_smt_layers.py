"""Layers with blocks on each kind of base against a dense weight in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spallm_serve.errors import UserError
from spallm_serve.layers import weight_shape
from spallm_serve.trainer.smt.layers import SmtLinear, check_block_index, grid_shape
from tests.spallm_serve.trainer.smt_models import dense_linear, scattered, weight_matrix

KINDS = ("linear", "conv1d", "sketched")


def make_layer(
    kind: str, rows: int = 10, columns: int = 14, size: int = 4, count: int = 4
) -> SmtLinear:
    base = dense_linear(kind, rows, columns)
    height, width = grid_shape(base, size)
    places = torch.randperm(height * width)[:count]
    index = torch.stack([places // width, places % width], 1).int()
    return SmtLinear(base, index, size)


def with_random_blocks(layer: SmtLinear) -> SmtLinear:
    nn.init.normal_(layer.blocks)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: str) -> None:
    assert weight_shape(dense_linear(kind, 10, 14)) == (10, 14)
    assert grid_shape(dense_linear(kind, 10, 14), 4) == (3, 4)
    layer = make_layer(kind)
    assert layer.blocks.shape == (4, 4, 4)
    assert layer.blocks.dtype == torch.float32
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["blocks"]
    assert "blocks=4, block_size=4" in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 90])
def test_zero_blocks_change_no_bit(kind: str, dtype: torch.dtype, tokens: int) -> None:
    layer = make_layer(kind)
    layer.base.to(dtype)
    x = torch.randn(2, tokens, 14).to(dtype)
    found = layer(x)
    assert found.dtype == dtype
    assert torch.equal(found, layer.base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_dense_layer_and_its_gradient(kind: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(
        rows=st.integers(1, 24),
        columns=st.integers(1, 24),
        size=st.integers(1, 9),
        count=st.integers(1, 12),
    )
    def check(rows: int, columns: int, size: int, count: int) -> None:
        layer = with_random_blocks(make_layer(kind, rows, columns, size, count))
        x = torch.randn(2, 3, columns, requires_grad=True)
        seed = torch.randn(2, 3, rows)
        out = layer(x)
        out.backward(seed)

        blocks = layer.blocks.detach().double().requires_grad_()
        dense_x = x.detach().double().requires_grad_()
        weight = weight_matrix(layer.base) + scattered(blocks, layer.block_index, rows, columns)
        assert isinstance(layer.base.bias, Tensor)
        dense_out = dense_x @ weight.T + layer.base.bias.double()
        dense_out.backward(seed.double())
        for found, wanted in (
            (out, dense_out),
            (x.grad, dense_x.grad),
            (layer.blocks.grad, blocks.grad),
        ):
            assert found is not None and wanted is not None
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_is_not_kept(kind: str) -> None:
    layer = make_layer(kind, rows=32, columns=64, count=3)
    x = torch.randn(10, 64, requires_grad=True)
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert x.untyped_storage().data_ptr() not in storages
    for own in (*layer.parameters(), *layer.buffers()):
        storages.pop(own.untyped_storage().data_ptr(), None)
    distinct = len(set(layer.block_index[:, 1].tolist()))
    assert list(storages.values()) == [10 * 4 * distinct * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    """Activations of float32 come in; a dense base then gives bfloat16, a sketch does not."""
    layer = with_random_blocks(make_layer(kind))
    x = torch.randn(3, 14, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, base = layer(x), layer.base(x)
    assert found.dtype == base.dtype
    delta = scattered(layer.blocks.detach().double(), layer.block_index, 10, 14)
    wanted = base.double() + x.detach().double() @ delta.T
    torch.testing.assert_close(found.double(), wanted, rtol=3e-2, atol=6e-2)
    found.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert layer.blocks.grad is not None and layer.blocks.grad.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_loading_another_state_counts(assign: bool) -> None:
    layer, x = with_random_blocks(make_layer("linear")), torch.randn(3, 14)
    layer(x)
    other = with_random_blocks(SmtLinear(layer.base, layer.block_index.flip(0) * 0, 4))
    other.block_index[:, 1] = torch.arange(4)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layer(x), other(x))


def test_a_copy_stands_for_itself() -> None:
    layer, x = with_random_blocks(make_layer("sketched")), torch.randn(3, 14)
    wanted = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.blocks.zero_()
    assert torch.equal(twin(x), wanted)
    assert not torch.equal(layer(x), wanted)


def test_a_layer_that_ran_in_inference_mode_can_be_trained() -> None:
    layer, x = make_layer("linear"), torch.randn(3, 14)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert layer.blocks.grad is not None and x.grad is not None


BAD = {
    "int64": (torch.zeros(1, 2, dtype=torch.int64), r"expected int32 \[m, 2\], got int64 \[1, 2\]"),
    "one dimension": (torch.zeros(2, dtype=torch.int32), r"got int32 \[2\]"),
    "three columns": (torch.zeros(1, 3, dtype=torch.int32), r"got int32 \[1, 3\]"),
    "empty": (torch.zeros(0, 2, dtype=torch.int32), "holds no block"),
    "row below": (torch.tensor([[-1, 0]]).int(), r"\(-1, 0\) is outside of 3 x 4"),
    "row above": (torch.tensor([[0, 0], [3, 0]]).int(), r"\(3, 0\) is outside of 3 x 4"),
    "column below": (torch.tensor([[0, -1]]).int(), r"\(0, -1\) is outside"),
    "column above": (torch.tensor([[0, 4]]).int(), r"\(0, 4\) is outside"),
    "duplicate": (torch.tensor([[1, 2], [0, 0], [1, 2]]).int(), r"\(1, 2\) is given twice"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_places_are_named(bad: str, kind: str) -> None:
    index, message = BAD[bad]
    with pytest.raises(UserError, match=f"here: .*{message}"):
        check_block_index(index, dense_linear(kind, 10, 14), 4, "here")


def test_a_block_larger_than_the_weight_is_one_ragged_block() -> None:
    base = dense_linear("linear", 10, 14)
    check_block_index(torch.zeros(1, 2, dtype=torch.int32), base, 64, "here")
    layer = with_random_blocks(SmtLinear(base, torch.zeros(1, 2, dtype=torch.int32), 64))
    x = torch.randn(3, 14)
    wanted = x @ (weight_matrix(base).float() + layer.blocks[0, :10, :14]).T + layer.base.bias
    torch.testing.assert_close(layer(x), wanted)
