"""A whole weight to codes and tables: bookkeeping against a naive version, and what must hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spallm_serve.checkpoint import LayerFormat
from spallm_serve.compressor import sketching
from spallm_serve.compressor.hessian import DampedFactor
from spallm_serve.compressor.lloyd import lloyd_tables
from spallm_serve.compressor.refit import output_error
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.compressor.sketching import (
    Curvature,
    column_weights,
    curvature,
    refine_sketch,
    sketch_rows,
    sketch_weight,
)
from spallm_serve.kernels.reference import dequantize

DAMPING = 0.1
FORMATS = [(7, 7), (9, 3), (15, 5), (33, 1), (129, 3), (96, 8)]  # columns, groups per row


def random_hessian(columns: int, common: float = 1.5) -> Tensor:
    """Of correlated inputs of different sizes, so that the columns have an order."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(3 * columns, columns, generator=generator)
    inputs += common * torch.randn(3 * columns, 1, generator=generator)
    inputs *= torch.rand(columns, generator=generator) * 3 + 0.3
    return 2 * inputs.T @ inputs / len(inputs)


def random_weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def sketch(
    weight: Tensor,
    inputs: Curvature,
    bits: int,
    groups: int,
    *,
    exponent: float = 2.0,
    refit: bool = False,
    cycles: int = 2,
) -> tuple[Tensor, Tensor]:
    codes, tables, error = sketch_weight(
        weight,
        inputs,
        bits,
        groups,
        weight_exponent=exponent,
        refit=refit,
        descent_cycles=cycles,
    )
    expected = errors_of(weight, (codes, tables), inputs.hessian)
    torch.testing.assert_close(error.double(), expected, rtol=1e-3, atol=1e-4)
    return codes, tables


def without_factor(inputs: Curvature) -> Curvature:
    return Curvature(inputs.hessian, inputs.order, DampedFactor(None, 1.0, 6))


def errors_of(weight: Tensor, found: tuple[Tensor, Tensor], hessian: Tensor) -> Tensor:
    return output_error(weight.double(), dequantize(*found).double(), hessian.double())


def test_curvature_orders_columns_by_falling_diagonal() -> None:
    hessian = torch.diag(torch.tensor([2.0, 5.0, 1.0, 5.0]))
    found = curvature(hessian, DAMPING)
    assert found.order.tolist() == [1, 3, 0, 2]
    assert found.factor.upper is not None
    expected = (torch.tensor([5.0, 5.0, 2.0, 1.0]) + DAMPING * 13 / 4).rsqrt()
    torch.testing.assert_close(found.factor.upper, torch.diag(expected))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 4.0])
def test_column_weights_are_powers_of_the_diagonal(exponent: float) -> None:
    factor = torch.tensor([[2.0, 7.0, 1.0], [0.0, 0.5, 3.0], [0.0, 0.0, 4.0]])
    powers = [value**-exponent for value in (2.0, 0.5, 4.0)]
    expected = torch.tensor([3 * power / sum(powers) for power in powers])
    torch.testing.assert_close(column_weights(factor, exponent), expected)


def naive_excess(
    weight: Tensor, hessian: Tensor, found: tuple[Tensor, Tensor], bits: int, exponent: float
) -> tuple[Tensor, Tensor]:
    """Naive tables, and how far beyond the nearest entry each code chose, all in float64.

    Columns keep their original names; rounding visits them by falling diagonal.
    """
    codes, tables = found
    columns, groups = weight.shape[1], tables.shape[1]
    width = columns // groups
    damped = hessian.double()
    damped = damped + DAMPING * damped.diagonal().mean() * torch.eye(columns)
    order = sorted(range(columns), key=lambda column: -float(hessian[column, column]))
    permuted = torch.stack([torch.stack([damped[i, j] for j in order]) for i in order])
    upper = torch.linalg.cholesky(torch.linalg.inv(permuted), upper=True)

    scale = torch.zeros(columns, dtype=torch.float64)
    for step, column in enumerate(order):
        scale[column] = upper[step, step] ** -exponent
    parts = [slice(group * width, (group + 1) * width) for group in range(groups)]
    learned = torch.stack(
        [lloyd_tables(weight[:, part], scale[part].float(), 1 << bits) for part in parts], dim=1
    ).double()

    work = weight.double()
    excess = torch.zeros_like(work)
    for step, column in enumerate(order):
        entries = learned[:, column // width]
        code = codes[:, column].long()[:, None]
        distance = (entries - work[:, column, None]).abs()
        excess[:, column] = distance.gather(1, code)[:, 0] - distance.amin(dim=1)
        error = (work[:, column] - entries.gather(1, code)[:, 0]) / upper[step, step]
        for later in range(step, columns):
            work[:, order[later]] -= error * upper[step, later]
    return learned, excess


@pytest.mark.parametrize(("columns", "groups"), [(24, 1), (30, 3), (140, 4)])
@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_order_and_groups_equal_a_naive_version(columns: int, groups: int, exponent: float) -> None:
    weight, hessian = random_weight(6, columns), random_hessian(columns)
    found = sketch(weight, curvature(hessian, DAMPING), 2, groups, exponent=exponent)
    tables, excess = naive_excess(weight, hessian, found, 2, exponent)
    torch.testing.assert_close(found[1].double(), tables, rtol=2e-3, atol=1e-4)
    assert float(excess.max()) < 2e-3


@pytest.mark.parametrize(("columns", "groups"), FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_and_tables_are_fit_for_disk(columns: int, groups: int, bits: int) -> None:
    weight, inputs = random_weight(4, columns), curvature(random_hessian(columns), DAMPING)
    for refit, cycles in ((False, 0), (True, 0), (True, 2)):
        codes, tables = sketch(weight, inputs, bits, groups, refit=refit, cycles=cycles)
        assert (codes.dtype, codes.shape) == (torch.uint8, weight.shape)
        assert (tables.dtype, tables.shape) == (torch.float32, (4, groups, 1 << bits))
        assert int(codes.max()) < 1 << bits
        assert bool(torch.isfinite(tables).all())
        assert torch.equal(tables, tables.half().float())
        assert bool((tables.diff(dim=2) >= 0).all())


def test_more_bits_and_more_groups_lose_less() -> None:
    weight, inputs = random_weight(20, 96), curvature(random_hessian(96), DAMPING)
    loss = {}
    for bits in (2, 3, 4):
        for groups in (1, 8):
            found = sketch(weight, inputs, bits, groups, refit=True)
            loss[bits, groups] = float(errors_of(weight, found, inputs.hessian).sum())
    for groups in (1, 8):
        assert loss[2, groups] > loss[3, groups] > loss[4, groups]
    for bits in (2, 3, 4):
        assert loss[bits, 1] > loss[bits, 8]


@pytest.mark.parametrize(("columns", "groups"), [(33, 1), (129, 3), (96, 8)])
@pytest.mark.parametrize("cycles", [0, 2])
def test_refining_never_makes_a_row_worse(columns: int, groups: int, cycles: int) -> None:
    weight, hessian = random_weight(16, columns), random_hessian(columns)
    codes, tables = sketch(weight, curvature(hessian, DAMPING), 2, groups)
    before = errors_of(weight, (codes, tables), hessian)
    refined = refine_sketch(weight, codes, tables, hessian, cycles)
    after = errors_of(weight, refined[:2], hessian)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.99 * float(before.sum())
    assert bool((refined[1].diff(dim=2) >= 0).all())


def test_refining_keeps_rows_that_are_exact_already() -> None:
    weight, hessian = random_weight(6, 33), random_hessian(33)
    codes, tables = sketch(weight, curvature(hessian, DAMPING), 3, 1)
    weight[::2] = dequantize(codes, tables)[::2]
    refined = refine_sketch(weight, codes, tables, hessian, 2)
    assert torch.equal(refined[0][::2], codes[::2])
    assert torch.equal(refined[1][::2], tables[::2])


@pytest.mark.parametrize(("columns", "groups"), [(33, 1), (96, 8)])
def test_refit_lowers_every_row_up_to_the_rounding_to_float16(columns: int, groups: int) -> None:
    weight, inputs = random_weight(16, columns), curvature(random_hessian(columns), DAMPING)
    plain = errors_of(weight, sketch(weight, inputs, 2, groups), inputs.hessian)
    refit = errors_of(weight, sketch(weight, inputs, 2, groups, refit=True), inputs.hessian)
    assert bool((refit <= plain * 1.01).all())
    assert float(refit.sum()) < 0.97 * float(plain.sum())


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("columns", "groups"), [(33, 1), (30, 3)])
def test_without_a_factor_weights_go_to_the_nearest_unweighted_entry(
    columns: int, groups: int, refit: bool
) -> None:
    weight = random_weight(8, columns)
    inputs = without_factor(curvature(random_hessian(columns), DAMPING))
    codes, tables = sketch(weight, inputs, 3, groups, refit=refit)
    width = columns // groups
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        learned = lloyd_tables(weight[:, part], torch.ones(width), 8)
        nearest = (weight[:, part, None] - learned[:, None, :]).abs().argmin(dim=2)
        assert torch.equal(codes[:, part].long(), nearest)
        torch.testing.assert_close(tables[:, group], learned.half().float())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_beats_nearest_rounding_under_correlated_inputs(bits: int) -> None:
    weight, inputs = random_weight(32, 96), curvature(random_hessian(96, common=3.0), DAMPING)
    feedback = errors_of(weight, sketch(weight, inputs, bits, 1), inputs.hessian)
    nearest = errors_of(weight, sketch(weight, without_factor(inputs), bits, 1), inputs.hessian)
    assert float(feedback.sum()) < 0.7 * float(nearest.sum())


def test_sketching_leaves_the_weight_alone() -> None:
    weight, inputs = random_weight(4, 33), curvature(random_hessian(33), DAMPING)
    copies = weight.clone(), inputs.hessian.clone()
    sketch(weight, inputs, 2, 3, refit=True)
    assert torch.equal(weight, copies[0])
    assert torch.equal(inputs.hessian, copies[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_chunks_equal_the_whole(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = random_weight(11, 33).to(dtype), curvature(random_hessian(33), DAMPING)
    chosen = LayerFormat(bits=3, groups_per_row=3)
    chosen_settings = CompressSettings(refit=False, device="cpu")
    whole = sketch_rows(weight, inputs, chosen, chosen_settings)
    expected = sketch(weight.float(), inputs, 3, 3)
    assert torch.equal(whole.codes, expected[0])
    assert torch.equal(whole.tables, expected[1])
    exact = errors_of(weight, expected, inputs.hessian)
    torch.testing.assert_close(whole.error, exact, rtol=1e-4, atol=1e-6)
    energy = (weight.double() @ inputs.hessian.double() * weight.double()).sum(dim=1)
    torch.testing.assert_close(whole.energy, energy, rtol=1e-4, atol=1e-6)
    assert whole.relative_error() == pytest.approx(float(exact.sum() / energy.sum()), rel=1e-4)
    part = slice(2, 5)
    assert whole.relative_error(part) == pytest.approx(
        float(exact[part].sum() / energy[part].sum()), rel=1e-4
    )

    monkeypatch.setattr(sketching, "_CHUNK_WEIGHTS", 4 * 33)
    chunked = sketch_rows(weight, inputs, chosen, chosen_settings)
    assert torch.equal(chunked.codes, whole.codes)
    assert torch.equal(chunked.tables, whole.tables)
    torch.testing.assert_close(chunked.error, whole.error, rtol=1e-4, atol=1e-6)


def test_relative_error_of_a_zero_weight_is_zero() -> None:
    inputs = curvature(random_hessian(9), DAMPING)
    found = sketch_rows(
        torch.zeros(3, 9), inputs, LayerFormat(bits=2, groups_per_row=1), CompressSettings()
    )
    assert found.relative_error() == 0
    assert not bool(dequantize(found.codes, found.tables).any())
