"""Least-squares tables and coordinate descent against float64 solvers and loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spallm_serve.compressor import refit
from spallm_serve.compressor.refit import (
    descend_codes,
    output_error,
    refit_tables,
    sort_tables,
)
from spallm_serve.kernels.reference import dequantize

CASES = [(17, 2, 1), (30, 3, 3), (64, 4, 2), (260, 2, 4)]  # columns, bits, groups


pytestmark = pytest.mark.usefixtures("loops")


@pytest.fixture(autouse=True)
def to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conjugate gradients, which stop early by default, go on until nothing is left to gain."""
    monkeypatch.setattr(refit, "_REFIT_STEPS", 64)


def gradient_of(weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor) -> Tensor:
    return (dequantize(codes, tables) - weight) @ hessian


def refitted(weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor) -> Tensor:
    return refit_tables(codes, tables, gradient_of(weight, codes, tables, hessian), hessian)


def descended(
    weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor, cycles: int
) -> Tensor:
    """The codes after some cycles; what is kept up to date beside them is looked at, too."""
    codes, approximation = codes.clone(), dequantize(codes, tables)
    gradient = gradient_of(weight, codes, tables, hessian)
    descend_codes(codes, tables, approximation, gradient, hessian, cycles)
    torch.testing.assert_close(approximation, dequantize(codes, tables))
    expected = gradient_of(weight, codes, tables, hessian)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    return codes


def random_hessian(columns: int, common: float = 2.0, outlier: float = 1.0) -> Tensor:
    """Of inputs that share a ``common`` part, one of them ``outlier`` times as large."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs += common * torch.randn(2 * columns, 1, generator=generator)
    inputs[:, columns // 2] *= outlier
    return 2 * inputs.T @ inputs / len(inputs)


def random_problem(
    columns: int, bits: int, groups: int, rows: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, codes (nearest entries), tables, Hessian."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(rows, columns, generator=generator)
    tables = torch.randn(rows, groups, 1 << bits, generator=generator).sort(dim=2).values
    grouped = weight.view(rows, groups, -1, 1)
    codes = (grouped - tables[:, :, None, :]).abs().argmin(dim=3).view(rows, columns)
    return weight, codes.to(torch.uint8), tables, random_hessian(columns)


def exact_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    difference = approximation.double() - weight.double()
    return torch.stack([row @ hessian.double() @ row for row in difference])


def exact_tables(weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor) -> Tensor:
    """``argmin_c |sqrt(H) (P c - w)|`` row by row; entries that no code uses are nan."""
    rows, groups, clusters = tables.shape
    columns = weight.shape[1]
    root = torch.linalg.cholesky(hessian.double()).T
    solution = torch.full((rows, groups * clusters), float("nan"), dtype=torch.float64)
    for row in range(rows):
        entry = torch.arange(columns) // (columns // groups) * clusters + codes[row].long()
        one_hot = torch.zeros(columns, groups * clusters, dtype=torch.float64)
        one_hot[torch.arange(columns), entry] = 1
        used = entry.unique()
        system = root @ one_hot[:, used]
        solution[row, used] = torch.linalg.lstsq(system, root @ weight[row].double()).solution
    return solution.view(tables.shape)


def test_output_error_is_the_quadratic_form_of_every_row() -> None:
    weight, codes, tables, hessian = random_problem(30, 3, 3)
    approximation = dequantize(codes, tables)
    found = output_error(weight, approximation, hessian)
    assert found.shape == (5,)
    exact = exact_error(weight, approximation, hessian)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(output_error(weight, weight, hessian), torch.zeros(5))


def test_output_error_is_the_squared_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 8, generator=generator)
    weight, approximation = torch.randn(2, 3, 8, generator=generator)
    outputs = inputs @ (approximation - weight).T
    found = output_error(weight, approximation, 2 * inputs.T @ inputs / 50)
    torch.testing.assert_close(found, 2 * outputs.square().mean(dim=0))


@pytest.mark.parametrize(("columns", "bits", "groups"), CASES)
def test_refit_equals_least_squares(columns: int, bits: int, groups: int) -> None:
    weight, codes, tables, _ = random_problem(columns, bits, groups)
    hessian = random_hessian(columns, common=0.0)
    found = refitted(weight, codes, tables, hessian)
    assert found.dtype == torch.float32
    exact = exact_tables(weight, codes, tables, hessian)
    used = ~exact.isnan()
    torch.testing.assert_close(found[used].double(), exact[used], rtol=2e-3, atol=2e-3)
    assert torch.equal(found[~used], tables[~used])


@pytest.mark.parametrize(("columns", "bits", "groups"), CASES)
def test_refit_reaches_the_optimum_under_correlated_inputs(
    columns: int, bits: int, groups: int
) -> None:
    weight, codes, tables, hessian = random_problem(columns, bits, groups)
    found = refitted(weight, codes, tables, hessian)
    exact = exact_tables(weight, codes, tables, hessian)
    best = exact_error(weight, dequantize(codes, exact), hessian)
    reached = exact_error(weight, dequantize(codes, found), hessian)
    # Along the flat directions of H tables may differ; the objective may not.
    assert bool((reached <= best * (1 + 1e-3)).all())


def test_refit_reaches_the_optimum_beside_an_outlier_channel() -> None:
    weight, codes, tables, _ = random_problem(256, 4, 8)
    hessian = random_hessian(256, outlier=300.0)
    found = refitted(weight, codes, tables, hessian)
    exact = exact_tables(weight, codes, tables, hessian)
    best = exact_error(weight, dequantize(codes, exact), hessian).sum()
    reached = exact_error(weight, dequantize(codes, found), hessian).sum()
    assert float(reached) <= 1.01 * float(best)


def test_refit_under_the_identity_gives_the_means() -> None:
    weight, codes, tables, _ = random_problem(30, 2, 3)
    found = refitted(weight, codes, tables, torch.eye(30))
    for row in range(5):
        for group in range(3):
            part = slice(10 * group, 10 * group + 10)
            for code in range(4):
                mine = weight[row, part][codes[row, part] == code]
                expected = mine.mean() if mine.numel() else tables[row, group, code]
                torch.testing.assert_close(found[row, group, code], expected)


def test_refit_keeps_entries_that_no_code_uses() -> None:
    weight, codes, tables, hessian = random_problem(24, 3, 2)
    codes[:, :12] = codes[:, :12] % 3
    codes[0] = 5
    found = refitted(weight, codes, tables, hessian)
    assert torch.equal(found[:, 0, 6:], tables[:, 0, 6:])
    assert torch.equal(found[0, :, :5], tables[0, :, :5])
    assert torch.equal(found[0, :, 6:], tables[0, :, 6:])
    assert not torch.equal(found[0, :, 5], tables[0, :, 5])


def test_refit_keeps_tables_that_fit_already() -> None:
    _, codes, tables, hessian = random_problem(30, 3, 3)
    found = refitted(dequantize(codes, tables), codes, tables, hessian)
    assert torch.equal(found, tables)


def test_refit_treats_every_row_by_itself() -> None:
    weight, codes, tables, hessian = random_problem(30, 2, 1)
    weight[2] *= 1e4
    weight[3] = 0
    weight[4] = dequantize(codes, tables)[4]
    found = refitted(weight, codes, tables, hessian)
    for row in range(5):
        one = slice(row, row + 1)
        alone = refitted(weight[one], codes[one], tables[one], hessian)
        reached = exact_error(weight[one], dequantize(codes[one], found[one]), hessian)
        wanted = exact_error(weight[one], dequantize(codes[one], alone), hessian)
        torch.testing.assert_close(reached, wanted, rtol=1e-3, atol=1e-3)


def naive_descent(
    weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor, cycles: int
) -> Tensor:
    """Try every entry for one weight after another; take the one with the least objective."""
    codes = codes.clone()
    rows, columns = weight.shape
    width = columns // tables.shape[1]
    full = hessian.double()
    for row in range(rows):
        difference = (dequantize(codes, tables)[row] - weight[row]).double()
        for _ in range(cycles):
            for column in range(columns):
                entries = tables[row, column // width].double()
                others = difference @ full[column] - difference[column] * full[column, column]
                trial = entries - weight[row, column].double()
                objective = trial**2 * full[column, column] + 2 * trial * others
                code = int(objective.argmin())
                codes[row, column] = code
                difference[column] = trial[code]
    return codes


@pytest.mark.parametrize(("columns", "bits", "groups"), CASES)
@pytest.mark.parametrize("cycles", [1, 2])
def test_descent_equals_a_naive_loop(columns: int, bits: int, groups: int, cycles: int) -> None:
    problem = random_problem(columns, bits, groups, rows=2)
    weight, _, tables, hessian = problem
    found = descended(*problem, cycles)
    assert found.dtype == torch.uint8
    expected = naive_descent(*problem, cycles)
    # A near-tie decided the other way changes what comes after it, so compare what is reached too.
    assert float((found != expected).float().mean()) < 0.02
    reached = exact_error(weight, dequantize(found, tables), hessian).sum()
    wanted = exact_error(weight, dequantize(expected, tables), hessian).sum()
    assert float(reached) == pytest.approx(float(wanted), rel=0.02)


@pytest.mark.parametrize(("columns", "bits", "groups"), CASES)
def test_descent_never_increases_the_objective(columns: int, bits: int, groups: int) -> None:
    weight, codes, tables, hessian = random_problem(columns, bits, groups, rows=20)
    before = exact_error(weight, dequantize(codes, tables), hessian)
    for _ in range(4):
        codes = descended(weight, codes, tables, hessian, 1)
        after = exact_error(weight, dequantize(codes, tables), hessian)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after


def test_descent_under_the_identity_is_nearest_rounding() -> None:
    weight, codes, tables, _ = random_problem(30, 3, 3)
    found = descended(weight, torch.zeros_like(codes), tables, torch.eye(30), 1)
    reached, nearest = dequantize(found, tables), dequantize(codes, tables)
    torch.testing.assert_close((reached - weight).abs(), (nearest - weight).abs())


def test_no_cycles_leave_the_codes() -> None:
    weight, codes, tables, hessian = random_problem(17, 2, 1)
    assert torch.equal(descended(weight, codes, tables, hessian, 0), codes)


def test_refit_and_descent_leave_their_inputs_alone() -> None:
    problem = random_problem(260, 2, 4)
    copies = [tensor.clone() for tensor in problem]
    refitted(*problem)
    descended(*problem, 2)
    assert all(torch.equal(a, b) for a, b in zip(problem, copies, strict=True))


@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 3), (4, 5)])
def test_sorting_keeps_the_weight_bit_for_bit(bits: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (6, 45), generator=generator, dtype=torch.uint8)
    tables = torch.randn(6, groups, 1 << bits, generator=generator)
    tables[0] = tables[0].round()  # equal entries
    new_codes, new_tables = sort_tables(codes, tables)
    assert new_codes.dtype == torch.uint8
    assert bool((new_tables.diff(dim=2) >= 0).all())
    assert torch.equal(new_tables, tables.sort(dim=2).values)
    assert torch.equal(dequantize(new_codes, new_tables), dequantize(codes, tables))
