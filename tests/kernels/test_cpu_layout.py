"""The layout of codes that the native kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spallm_serve.kernels.cpu.layout import from_cpu_layout, read_header, row_bytes, to_cpu_layout
from spallm_serve.kernels.packing import pack_codes


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    rows=st.integers(0, 9),
    width=st.integers(1, 600),
    groups=st.integers(1, 5),
)
def test_round_trip(bits: int, rows: int, width: int, groups: int) -> None:
    columns = width * groups
    planes = pack_codes(torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8), bits)
    packed = to_cpu_layout(planes, columns, groups)
    assert packed.shape == (1 + rows, row_bytes(columns, groups, bits))
    assert read_header(packed) == (rows, columns, groups, bits)
    assert packed.data_ptr() % 64 == 0
    assert packed.shape[1] % 64 == 0
    assert torch.equal(from_cpu_layout(packed), planes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_wide_rows_take_no_more_than_their_bits(bits: int) -> None:
    assert row_bytes(4096, 1, bits) == 4096 * bits // 8
    assert row_bytes(4096, 8, bits) == 4096 * bits // 8


def test_groups_must_divide_the_columns() -> None:
    planes = pack_codes(torch.zeros(2, 10, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="groups: 3 does not divide 10 columns"):
        to_cpu_layout(planes, 10, 3)
