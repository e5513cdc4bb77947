"""Tables for given codes: against NumPy's least squares in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spallm_serve.compressor.projection import fit_tables, project_layer
from spallm_serve.compressor.refit import output_error
from spallm_serve.errors import UserError
from spallm_serve.kernels.reference import dequantize
from spallm_serve.sketch import Sketch

ROWS, COLUMNS = 7, 48


def problem(bits: int, groups: int, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, tables, a weight, and the inputs of a layer, some of them large."""
    random = torch.Generator().manual_seed(bits * 10 + groups)
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=random, dtype=torch.uint8)
    tables = torch.randn(ROWS, groups, 1 << bits, generator=random).half().float()
    weight = torch.randn(ROWS, COLUMNS, generator=random)
    inputs = torch.randn(tokens, COLUMNS, generator=random)
    inputs = inputs @ torch.randn(COLUMNS, COLUMNS, generator=random)
    inputs[:, 5] *= 30
    return codes, tables, weight, inputs


def one_hot(codes: Tensor, groups: int, entries: int) -> np.ndarray:
    """``[columns, groups * entries]`` of one row's codes."""
    matrix = np.zeros((COLUMNS, groups * entries))
    for column, code in enumerate(codes.tolist()):
        matrix[column, column // (COLUMNS // groups) * entries + code] = 1
    return matrix


def oracle(
    codes: Tensor, tables: Tensor, weight: Tensor, inputs: Tensor, ridge: float = 1e-5
) -> Tensor:
    """Minimises ``||X (w_hat - w)||^2`` with the step's ridge, a share of each column's energy."""
    _, groups, entries = tables.shape
    x = inputs.double().numpy()
    staying = ridge**0.5 * np.diag(np.linalg.norm(x, axis=0))
    found = []
    for row in range(ROWS):
        p = one_hot(codes[row], groups, entries)
        start = tables[row].double().numpy().ravel()
        residual = x @ (weight[row].double().numpy() - p @ start)
        system = np.concatenate([x @ p, staying @ p])
        right = np.concatenate([residual, np.zeros(COLUMNS)])
        step = np.linalg.lstsq(system, right, rcond=None)[0]
        found.append(start + step)
    return torch.tensor(np.array(found)).view(tables.shape)


@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 2), (4, 1)])
def test_under_a_hessian_it_is_least_squares(bits: int, groups: int, loops: str) -> None:
    codes, tables, weight, inputs = problem(bits, groups)
    hessian = inputs.T @ inputs
    found = fit_tables(codes, tables, weight, hessian)
    wanted = oracle(codes, tables, weight, inputs)
    plain = oracle(codes, tables, weight, inputs, ridge=0)
    error, least = (
        output_error(weight.double(), dequantize(codes, each.double()), hessian.double())
        for each in (found, plain)
    )
    assert bool((error <= least * (1 + 1e-3)).all())
    if loops == "native":  # else conjugate gradients stop near it
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_more_entries_than_are_solved_at_once(loops: str) -> None:
    """16 groups of 16: walked towards by conjugate gradients; most entries stand for no code."""
    codes, tables, weight, inputs = problem(4, 16, tokens=2000)
    hessian = inputs.T @ inputs
    found = fit_tables(codes, tables, weight, hessian)
    means = fit_tables(codes, tables, weight)
    error, plain = (output_error(weight, dequantize(codes, t), hessian) for t in (found, means))
    assert bool((error < plain).all())


@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 2), (4, 4)])
def test_without_text_an_entry_is_the_mean_of_its_weights(bits: int, groups: int) -> None:
    codes, tables, weight, _ = problem(bits, groups)
    found = fit_tables(codes, tables, weight)
    width = COLUMNS // groups
    for row in range(ROWS):
        for group in range(groups):
            part = slice(group * width, (group + 1) * width)
            for entry in range(1 << bits):
                using = weight[row, part][codes[row, part] == entry]
                wanted = using.double().mean().float() if len(using) else tables[row, group, entry]
                assert float(found[row, group, entry]) == pytest.approx(float(wanted), abs=1e-7)
    identity = torch.eye(COLUMNS)
    wanted = oracle(codes, tables, weight, identity, ridge=0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 2)])
def test_under_a_hessian_it_beats_the_means(bits: int, groups: int) -> None:
    codes, tables, weight, inputs = problem(bits, groups)
    hessian = inputs.T @ inputs
    found, means = fit_tables(codes, tables, weight, hessian), fit_tables(codes, tables, weight)
    error, plain = (output_error(weight, dequantize(codes, t), hessian) for t in (found, means))
    assert bool((error <= plain).all())
    assert float(error.sum()) < 0.9 * float(plain.sum())


@pytest.mark.parametrize("under_text", [False, True])
def test_a_change_that_tables_can_make_is_kept_exactly(under_text: bool, loops: str) -> None:
    codes, tables, _, inputs = problem(3, 2)
    wanted = tables + 0.1 * torch.randn(tables.shape, generator=torch.Generator().manual_seed(1))
    used = fit_tables(codes, tables, torch.full((ROWS, COLUMNS), torch.inf)) == torch.inf
    wanted = torch.where(used, wanted.half().float(), tables)
    sketch = Sketch.from_codes(codes, tables)
    hessian = inputs.T @ inputs if under_text else None
    found = project_layer("layer", sketch, dequantize(codes, wanted), sketch.weight(), hessian)
    assert found.tables.dtype == torch.float16
    assert found.change.wanted > 0
    if not under_text:
        assert torch.equal(found.tables.float(), wanted)
        assert found.change.relative_error < 1e-6
    else:  # to within the ridge; conjugate gradients stop earlier
        tolerance = 2e-4 if loops == "native" else 5e-3
        torch.testing.assert_close(found.tables.float(), wanted, rtol=1e-3, atol=tolerance)
        assert found.change.relative_error < 5 * tolerance


def test_what_the_inputs_do_not_determine_stays_the_bases() -> None:
    """A dead group of columns, and fewer tokens than entries."""
    codes, tables, weight, inputs = problem(3, 2, tokens=5)
    inputs[:, COLUMNS // 2 :] = 0
    found = fit_tables(codes, tables, weight, inputs.T @ inputs)
    assert torch.equal(found[:, 1], tables[:, 1])
    assert not torch.equal(found[:, 0], tables[:, 0])
    wanted = oracle(codes, tables, weight, inputs)
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.2)


def test_an_entry_without_a_code_keeps_its_value() -> None:
    codes, tables, weight, inputs = problem(3, 1)
    codes[codes == 5] = 4
    for hessian in (None, inputs.T @ inputs):
        found = fit_tables(codes, tables, weight, hessian)
        assert torch.equal(found[..., 5], tables[..., 5])


@pytest.mark.parametrize("under_text", [False, True])
def test_what_was_lost_is_measured_from_what_was_before(under_text: bool) -> None:
    codes, tables, weight, inputs = problem(3, 1)
    sketch = Sketch.from_codes(codes, tables)
    hessian = inputs.T @ inputs if under_text else None
    metric = torch.eye(COLUMNS) if hessian is None else hessian

    def norm(difference: Tensor) -> float:
        return float(((difference @ metric) * difference).sum().clamp(min=0).sqrt())

    delta = 0.1 * torch.randn(ROWS, 2) @ torch.randn(2, COLUMNS)
    base = sketch.weight()
    found = project_layer("layer", sketch, base + delta, base, hessian)
    kept = dequantize(codes, found.tables.float()) - base
    assert found.change.relative_error == pytest.approx(norm(delta - kept) / norm(delta), rel=1e-3)
    assert 0 < found.change.relative_error < 1
    # From an original that is not the base's own weight: the same change, and the same loss of it.
    other = project_layer("layer", sketch, weight + delta, weight, hessian)
    assert other.change.relative_error == pytest.approx(found.change.relative_error, rel=0.02)
    assert not torch.equal(other.tables, found.tables)


def test_no_change_loses_nothing() -> None:
    codes, tables, _, inputs = problem(2, 1)
    sketch = Sketch.from_codes(codes, tables)
    for hessian in (None, inputs.T @ inputs):
        found = project_layer("layer", sketch, sketch.weight(), sketch.weight(), hessian)
        assert torch.equal(found.tables, sketch.tables)
        assert found.change.relative_error == 0


def test_beyond_float16() -> None:
    codes, tables, weight, _ = problem(2, 1)
    sketch = Sketch.from_codes(codes, tables)
    with pytest.raises(UserError, match=r"layer.*float16"):
        project_layer("layer", sketch, weight * 1e6, sketch.weight(), None)
