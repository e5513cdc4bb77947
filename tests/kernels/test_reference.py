"""The plain look-up against naive loops, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spallm_serve.kernels.reference import dequantize

SHAPES = [(3, 7, 2, 1), (2, 12, 3, 3), (4, 24, 4, 8), (1, 129, 2, 3), (0, 8, 2, 2)]


def random_sketch(rows: int, columns: int, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns + bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    tables = torch.randn(rows, groups, 1 << bits, generator=generator, dtype=torch.float64)
    return codes, tables


@pytest.mark.parametrize(("rows", "columns", "bits", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_weight_is_the_entry_its_code_names(
    rows: int, columns: int, bits: int, groups: int, dtype: torch.dtype
) -> None:
    codes, tables = random_sketch(rows, columns, bits, groups)
    tables = tables.to(dtype)
    expected = torch.zeros(rows, columns, dtype=dtype)
    for row in range(rows):
        for column in range(columns):
            group = column // (columns // groups)
            expected[row, column] = tables[row, group, int(codes[row, column])]
    found = dequantize(codes, tables)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("rows", "columns", "bits", "groups"), SHAPES[:4])
def test_gradient_of_an_entry_is_the_sum_over_the_weights_that_share_it(
    rows: int, columns: int, bits: int, groups: int
) -> None:
    codes, tables = random_sketch(rows, columns, bits, groups)
    tables.requires_grad_()
    upstream = torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    dequantize(codes, tables).backward(upstream)
    expected = torch.zeros(tables.shape, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            group = column // (columns // groups)
            expected[row, group, int(codes[row, column])] += upstream[row, column]
    assert tables.grad is not None
    torch.testing.assert_close(tables.grad, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    codes, tables = random_sketch(2, 12, 2, 3)
    assert torch.autograd.gradcheck(lambda t: dequantize(codes, t), tables.requires_grad_())
