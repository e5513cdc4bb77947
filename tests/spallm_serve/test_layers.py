"""Sketched modules against dense matrices looked up entry by entry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from spallm_serve.kernels import explain
from spallm_serve.layers import SketchedEmbedding, SketchedLinear, TiedHead
from spallm_serve.sketch import Sketch

ROWS, COLUMNS = 11, 12
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sketch(bits: int = 3, groups: int = 2, seed: int = 0) -> Sketch:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=generator).to(torch.uint8)
    return Sketch.from_codes(codes, torch.randn(ROWS, groups, 1 << bits, generator=generator))


def dense(sketched: Sketch) -> Tensor:
    """float64, entry by entry."""
    codes, tables = sketched.codes.tolist(), sketched.tables.double()
    width = COLUMNS // tables.shape[1]
    entries = [
        [float(tables[r, j // width, codes[r][j]]) for j in range(COLUMNS)] for r in range(ROWS)
    ]
    return torch.tensor(entries, dtype=torch.float64)


def filled(module: nn.Module, sketched: Sketch, **more: Tensor) -> nn.Module:
    module.load_state_dict({"codes": sketched.planes, "tables": sketched.tables, **more})
    return module


def close(found: Tensor, wanted: Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 2), (4, 4)])
def test_linear(bits: int, groups: int, bias: bool, dtype: torch.dtype) -> None:
    sketched = sketch(bits, groups)
    added = {"bias": torch.linspace(-1, 1, ROWS).to(dtype)} if bias else {}
    layer = filled(SketchedLinear(COLUMNS, ROWS, bits, groups, bias, dtype), sketched, **added)
    x = torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        found = layer(x)
    wanted = x.double() @ dense(sketched).T + (added["bias"].double() if bias else 0)
    assert (found.dtype, found.shape) == (dtype, (2, 5, ROWS))
    close(found, wanted)
    assert layer.state_dict().keys() == {"codes", "tables", *added}
    assert layer.codes.dtype == torch.uint8
    assert layer.tables.dtype == torch.float16
    for part in (f"bits={bits}", f"groups_per_row={groups}", f"bias={bias}"):
        assert part in repr(layer)


def test_one_layer_serves_all_types() -> None:
    sketched = sketch()
    layer = filled(SketchedLinear(COLUMNS, ROWS, 3, 2, False), sketched)
    for dtype in (*DTYPES, torch.float32):
        x = torch.eye(COLUMNS, dtype=dtype)
        close(layer(x), dense(sketched).to(dtype).double().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 6.0])
def test_embedding(scale: float | None, dtype: torch.dtype) -> None:
    sketched = sketch()
    embedding = filled(SketchedEmbedding(ROWS, COLUMNS, 3, 2, scale, dtype), sketched)
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    found = embedding(ids)
    assert (found.dtype, found.shape) == (dtype, (2, 3, COLUMNS))
    close(found, dense(sketched)[ids] * (scale or 1))
    assert embedding.state_dict().keys() == {"codes", "tables"}
    assert embedding(ids[:, :0]).shape == (2, 0, COLUMNS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_tied_head(bias: bool, dtype: torch.dtype) -> None:
    sketched = sketch()
    embedding = filled(SketchedEmbedding(ROWS, COLUMNS, 3, 2, 6.0, dtype), sketched)
    added = nn.Parameter(torch.linspace(-1, 1, ROWS).to(dtype)) if bias else None
    head = TiedHead(embedding, added)
    x = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        found = head(x)
    assert found.dtype == dtype
    # The scale belongs to looking up, not to the matrix.
    close(found, x.double() @ dense(sketched).T + (0 if added is None else added.double()))
    assert head.state_dict().keys() == ({"bias"} if bias else set())
    assert list(head.children()) == []


def test_tie_survives_a_copy() -> None:
    embedding = filled(SketchedEmbedding(ROWS, COLUMNS, 3, 2), sketch())
    model = nn.ModuleDict({"embedding": embedding, "head": TiedHead(embedding)})
    twin = copy.deepcopy(model)
    filled(twin["embedding"], sketch(seed=1))
    x = torch.eye(COLUMNS)
    close(twin["head"](x), dense(sketch(seed=1)).T)
    close(model["head"](x), dense(sketch()).T)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_casting_leaves_tables_as_they_are(dtype: torch.dtype) -> None:
    """Entries of float16 have more digits than bfloat16 holds."""
    sketched = sketch()
    layer = filled(SketchedLinear(COLUMNS, ROWS, 3, 2, True), sketched, bias=torch.ones(ROWS))
    layer.to(dtype)
    assert layer.tables.dtype == torch.float16
    assert torch.equal(layer.tables, sketched.tables)
    assert torch.equal(layer.codes, sketched.planes)
    assert layer.bias.dtype == dtype
    with torch.no_grad():
        assert layer(torch.ones(1, COLUMNS, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_an_embedding_casts_what_it_gives(dtype: torch.dtype) -> None:
    embedding = filled(SketchedEmbedding(ROWS, COLUMNS, 3, 2), sketch()).to(dtype)
    assert embedding(torch.tensor([1])).dtype == dtype


@pytest.mark.parametrize("assign", [False, True])
def test_loading_another_state_counts(assign: bool) -> None:
    layer = filled(SketchedLinear(COLUMNS, ROWS, 3, 2, False), sketch())
    layer(torch.eye(COLUMNS))
    other = sketch(seed=1)
    layer.load_state_dict({"codes": other.planes, "tables": other.tables}, assign=assign)
    close(layer(torch.eye(COLUMNS)), dense(other).T)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_another_embedding_counts_for_its_head(assign: bool) -> None:
    embedding = filled(SketchedEmbedding(ROWS, COLUMNS, 3, 2), sketch())
    head = TiedHead(embedding)
    head(torch.eye(COLUMNS))
    other = sketch(seed=1)
    embedding.load_state_dict({"codes": other.planes, "tables": other.tables}, assign=assign)
    close(head(torch.eye(COLUMNS)), dense(other).T)


def test_codes_are_held_once_and_saved_as_they_came() -> None:
    sketched = sketch()
    layer = filled(SketchedLinear(COLUMNS, ROWS, 3, 2, False), sketched)
    x = torch.eye(COLUMNS)
    layer(x)
    held = [buffer for name, buffer in layer.named_buffers() if name != "tables"]
    assert len(held) == 1
    assert explain("cpu", x.dtype).backend == "reference" or held[0].dim() == 2
    assert torch.equal(layer.state_dict()["codes"], sketched.planes)
    close(layer(x), dense(sketched).T)
    assert torch.equal(copy.deepcopy(layer).double().codes, sketched.planes)


def test_a_layer_that_ran_in_inference_mode_can_be_trained() -> None:
    layer = filled(SketchedLinear(COLUMNS, ROWS, 3, 2, bias=False), sketch())
    x = torch.randn(4, COLUMNS)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), dense(sketch()).sum(0).expand(4, -1))
