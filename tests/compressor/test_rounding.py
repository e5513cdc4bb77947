"""Rounding with error feedback against the equations, replayed in float64 column by column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spallm_serve.compressor.rounding import TransposedTables, round_with_feedback

pytestmark = pytest.mark.usefixtures("loops")


def random_problem(
    rows: int, columns: int, bits: int, n_groups: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, tables, a shuffled group for each column, and a well-mixed upper factor."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    tables = torch.randn(rows, n_groups, 1 << bits, generator=generator).sort(dim=2).values
    groups = torch.arange(columns) % n_groups
    groups = groups[torch.randperm(columns, generator=generator)]
    inputs = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    inputs += torch.randn(2 * columns, 1, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return weight, tables, groups, factor.float()


def excess_distances(
    weight: Tensor, tables: Tensor, groups: Tensor, factor: Tensor, codes: Tensor
) -> Tensor:
    """How much farther than the nearest entry each chosen one is, had the rest gone the same way.

    ``code = argmin |c_k - w_i|``, ``e = (w_i - c) / U_ii``, ``W[:, i:] -= e U[i, i:]``: following
    given codes keeps one near-tie decided the other way from changing everything after it.
    """
    work, upper, tables = weight.double(), factor.double(), tables.double()
    excess = torch.zeros_like(work)
    for i in range(weight.shape[1]):
        distance = (tables[:, int(groups[i])] - work[:, i, None]).abs()
        code = codes[:, i].long()[:, None]
        excess[:, i] = distance.gather(1, code)[:, 0] - distance.amin(dim=1)
        chosen = tables[:, int(groups[i])].gather(1, code)[:, 0]
        error = (work[:, i] - chosen) / upper[i, i]
        work[:, i:] = work[:, i:] - error[:, None] * upper[i, i:]
    return excess


@pytest.mark.parametrize("columns", [1, 3, 127, 128, 129, 300])
@pytest.mark.parametrize(("bits", "n_groups"), [(2, 1), (3, 3), (4, 2)])
def test_equals_the_equations(columns: int, bits: int, n_groups: int) -> None:
    problem = random_problem(6, columns, bits, n_groups)
    codes = round_with_feedback(*problem)
    assert codes.dtype == torch.uint8
    assert codes.shape == (6, columns)
    assert int(codes.max()) < 1 << bits
    assert float(excess_distances(*problem, codes).max()) < 1e-4


def test_codes_of_a_small_problem_are_exactly_those_of_a_plain_loop() -> None:
    weight, tables, groups, factor = random_problem(5, 20, 2, 2)
    work, expected = weight.double(), torch.zeros(5, 20, dtype=torch.uint8)
    for row in range(5):
        for i in range(20):
            entries = tables[row, int(groups[i])].double()
            code = int((entries - work[row, i]).abs().argmin())
            expected[row, i] = code
            error = (work[row, i] - entries[code]) / factor[i, i].double()
            for later in range(i, 20):
                work[row, later] -= error * factor[i, later].double()
    assert torch.equal(round_with_feedback(weight, tables, groups, factor), expected)


def test_identity_factor_is_plain_nearest_rounding() -> None:
    weight, tables, groups, _ = random_problem(7, 200, 3, 4)
    codes = round_with_feedback(weight, tables, groups, torch.eye(200))
    entries = tables[:, groups]
    expected = (entries - weight[:, :, None]).abs().argmin(dim=2)
    assert torch.equal(codes.long(), expected)


def test_rows_do_not_touch_each_other() -> None:
    weight, tables, groups, factor = random_problem(6, 140, 2, 2)
    whole = round_with_feedback(weight, tables, groups, factor)
    for row in range(6):
        alone = round_with_feedback(weight[row : row + 1], tables[row : row + 1], groups, factor)
        assert torch.equal(alone, whole[row : row + 1])


def test_weights_on_the_grid_are_kept() -> None:
    _, tables, groups, factor = random_problem(4, 150, 3, 3)
    codes = torch.randint(0, 8, (4, 150), generator=torch.Generator().manual_seed(2))
    weight = tables[:, groups].gather(2, codes[:, :, None])[:, :, 0]
    assert torch.equal(round_with_feedback(weight, tables, groups, factor).long(), codes)


def test_inputs_are_left_alone() -> None:
    problem = random_problem(3, 130, 2, 2)
    copies = [tensor.clone() for tensor in problem]
    round_with_feedback(*problem)
    assert all(torch.equal(a, b) for a, b in zip(problem, copies, strict=True))


def test_nearest_finds_code_and_entry_beyond_both_ends() -> None:
    tables = torch.tensor([[[-1.0, 0.0, 2.0, 4.0]], [[5.0, 5.0, 6.0, 7.0]]])
    code, entry = TransposedTables(tables).nearest(torch.tensor([9.0, -9.0]), 0)
    assert code.tolist() == [3, 0]
    assert entry.tolist() == [4.0, 5.0]
