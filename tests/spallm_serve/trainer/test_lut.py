"""Tables as a method: gradients against a dense oracle, rows, norms, what is written."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spallm_serve.adapted import apply_adapter
from spallm_serve.adapter import ROWS, Adapter, LutConfig
from spallm_serve.checkpoint import TABLES
from spallm_serve.errors import UserError
from spallm_serve.identity import base_identity
from spallm_serve.kernels.reference import dequantize
from spallm_serve.layers import SketchedLinear
from spallm_serve.models import load_model
from spallm_serve.sketch import Sketch
from spallm_serve.trainer.lut.layers import TunedLinear, TunedRows
from spallm_serve.trainer.lut.method import Lut, LutSettings
from spallm_serve.trainer.lut.select import top_rows
from spallm_serve.trainer.method import WarmUp
from spallm_serve.trainer.model import LossModel, freeze

ROW_COUNT, COLUMNS = 11, 12


def layer(bits: int, groups: int) -> tuple[SketchedLinear, Tensor]:
    """A random layer and its codes."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (ROW_COUNT, COLUMNS), generator=generator).to(torch.uint8)
    sketch = Sketch.from_codes(codes, torch.randn(ROW_COUNT, groups, 1 << bits))
    made = SketchedLinear(COLUMNS, ROW_COUNT, bits, groups, bias=False)
    made.load_state_dict({"codes": sketch.planes, "tables": sketch.tables})
    return made, codes


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rows", [None, [0, 3, 10], [5]])
def test_gradients_are_those_of_the_dense_weight(
    bits: int, groups: int, rows: list[int] | None
) -> None:
    made, codes = layer(bits, groups)
    tuned = TunedLinear(made) if rows is None else TunedRows(made, torch.tensor(rows).int())
    x = torch.randn(2, 5, COLUMNS, requires_grad=True)
    dy = torch.randn(2, 5, ROW_COUNT)
    y = tuned(x)
    y.backward(dy)

    tables = made.tables.double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    wanted = wide @ dequantize(codes, tables).T
    wanted.backward(dy.double())
    assert tables.grad is not None
    assert tuned.tables.grad is not None
    chosen = tables.grad if rows is None else tables.grad[rows]
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuned.tables.grad.double(), chosen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


def test_rows_that_changed_count_in_the_next_pass() -> None:
    made, codes = layer(3, 2)
    tuned = TunedRows(made, torch.tensor([2, 7]).int())
    x = torch.randn(4, COLUMNS)
    before = tuned(x)
    with torch.no_grad():
        tuned.tables.add_(1)
    tables = made.tables.float()
    tables[[2, 7]] += 1
    after = tuned(x)
    torch.testing.assert_close(after, x @ dequantize(codes, tables).T)
    unchanged = [row for row in range(ROW_COUNT) if row not in (2, 7)]
    assert torch.equal(after[:, unchanged], before[:, unchanged])
    assert made.tables.dtype == torch.float16


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=5),
    st.floats(0.01, 1),
)
def test_rows_are_chosen_over_all_layers(scores: list[list[int]], share: float) -> None:
    named = {str(number): torch.tensor(layer).float() for number, layer in enumerate(scores)}
    found = {(name, int(row)) for name, rows in top_rows(named, share).items() for row in rows}
    every = [
        (-score, number, row)
        for number, layer in enumerate(scores)
        for row, score in enumerate(layer)
    ]
    wanted = sorted(every)[: max(1, int(share * len(every)))]
    assert found == {(str(number), row) for _, number, row in wanted}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def prepared(base: Path, settings: LutSettings) -> tuple[nn.Module, Lut, dict[str, nn.Parameter]]:
    model = load_model(base)
    freeze(model)
    method, loss = Lut(settings), LossModel(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = method.select(model, WarmUp(iter([batch()] * 2), lambda each: loss(**each)["loss"]))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return model, method, method.prepare(model, chosen)


def test_the_chosen_rows_have_the_largest_gradients(sketched_base: Path) -> None:
    model, _, trained = prepared(sketched_base, LutSettings(rows=1.0))
    LossModel(model)(**batch())["loss"].backward()
    norms = {
        name.removesuffix(TABLES): parameter.grad.flatten(1).norm(dim=1)
        for name, parameter in trained.items()
    }
    _, method, few = prepared(sketched_base, LutSettings(rows=0.1, warm_up_batches=2))
    adapter = method.adapter("ab" * 32, "")
    chosen = {(name, int(row)) for name in norms for row in adapter.tensors.get(name + ROWS, [])}
    every = sorted(
        (
            (float(norm), name, row)
            for name, layer in norms.items()
            for row, norm in enumerate(layer)
        ),
        reverse=True,
    )
    assert chosen == {(name, row) for _, name, row in every[: len(every) // 10]}
    assert sum(len(parameter) for parameter in few.values()) == len(every) // 10


@pytest.mark.parametrize("rows", [1.0, 0.2])
@pytest.mark.parametrize("norms", [False, True])
def test_what_was_trained_is_what_is_read(rows: float, norms: bool, sketched_base: Path) -> None:
    model, method, trained = prepared(sketched_base, LutSettings(rows=rows, norms=norms))
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.half())  # as it will be in the file
    other = load_model(sketched_base)
    apply_adapter(other, method.adapter(base_identity(other), "base"))
    ids = batch()["input_ids"]
    with torch.no_grad():
        wanted, found = model(input_ids=ids).logits, other(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_are_trained_in_float32_within_any_model(
    dtype: torch.dtype, sketched_base: Path
) -> None:
    model = load_model(sketched_base, dtype)
    freeze(model)
    with torch.no_grad():
        before = model(input_ids=batch()["input_ids"]).logits
    trained = Lut(LutSettings(norms=True)).prepare(model, {})
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert any(name.endswith("norm.weight") for name in trained)
    with torch.no_grad():
        after = model(input_ids=batch()["input_ids"]).logits
    assert after.dtype == dtype
    assert torch.equal(after, before)
    LossModel(model)(**batch())["loss"].backward()
    assert all(parameter.grad is not None for parameter in trained.values())


def test_a_dense_model_is_refused(dense_base: Path) -> None:
    with pytest.raises(UserError, match="not compressed"):
        Lut(LutSettings()).prepare(load_model(dense_base), {})


def test_adapters_that_do_not_fit_change_nothing(sketched_base: Path) -> None:
    model = load_model(sketched_base)
    state = copy.deepcopy(model.state_dict())
    name = "model.layers.0.mlp.up_proj"
    good = model.get_submodule(name).tables
    config = LutConfig(base_digest=base_identity(model))
    norm = "model.norm.weight"
    wrong: list[dict[str, Tensor]] = [
        {name + TABLES: good[:-1]},
        {name + TABLES: good.int()},
        {"model.layers.9.mlp.up_proj" + TABLES: good},
        {"model.norm" + TABLES: good},
        {name + TABLES: good[:2], name + ROWS: torch.tensor([1, 1]).int()},
        {name + TABLES: good[:2], name + ROWS: torch.tensor([2, 1]).int()},
        {name + TABLES: good[:2], name + ROWS: torch.tensor([-1, 1]).int()},
        {name + TABLES: good[:2], name + ROWS: torch.tensor([1, len(good)]).int()},
        {name + TABLES: good[:2], name + ROWS: torch.tensor([1.0, 2.0])},
        {name + TABLES: good[:2], name + ROWS: torch.tensor(1).int()},
        {name + TABLES: good, "model.layers.1.mlp.up_proj" + ROWS: torch.tensor([1]).int()},
        {name + TABLES: good, norm: torch.zeros(3)},
        {name + TABLES: good, "lm_head.weight": torch.zeros(3)},
    ]
    for tensors in wrong:
        with pytest.raises(UserError):
            apply_adapter(model, Adapter(config, tensors))
    with pytest.raises(UserError, match="ab" * 32):
        apply_adapter(model, Adapter(LutConfig(base_digest="ab" * 32), {name + TABLES: good}))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
