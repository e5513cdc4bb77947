"""Bit-planes against a naive loop over single bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spallm_serve.kernels.packing import pack_codes, plane_width, unpack_codes

ODD_WIDTHS = (1, 7, 8, 9, 15, 16, 17, 127, 128, 129)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def naive_planes(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    planes = torch.zeros(bits, rows, (columns + 7) // 8, dtype=torch.uint8)
    for plane in range(bits):
        for row in range(rows):
            for column in range(columns):
                bit = (int(codes[row, column]) >> plane) & 1
                planes[plane, row, column // 8] += bit << (column % 8)
    return planes


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    rows=st.integers(0, 5),
    columns=st.one_of(st.sampled_from(ODD_WIDTHS), st.integers(1, 40)),
    seed=st.integers(0, 1000),
)
def test_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    planes = pack_codes(codes, bits)
    assert planes.dtype == torch.uint8
    assert planes.shape == (bits, rows, plane_width(columns))
    unpacked = unpack_codes(planes, columns)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33])
def test_layout_equals_a_naive_loop(bits: int, columns: int) -> None:
    codes = random_codes(3, columns, bits)
    assert torch.equal(pack_codes(codes, bits), naive_planes(codes, bits))


def test_layout_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3, 0, 0, 0, 0, 1, 2]], dtype=torch.uint8)
    planes = pack_codes(codes, 2)
    assert planes[0].tolist() == [[0b10000101, 0b0]]
    assert planes[1].tolist() == [[0b00000110, 0b1]]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", ODD_WIDTHS)
def test_top_code_sets_every_used_bit_and_no_other(bits: int, columns: int) -> None:
    codes = torch.full((2, columns), (1 << bits) - 1, dtype=torch.uint8)
    planes = pack_codes(codes, bits)
    used = sum(byte.bit_count() for byte in planes.flatten().tolist())
    assert used == bits * 2 * columns
    last = (1 << ((columns - 1) % 8 + 1)) - 1
    assert bool((planes[:, :, -1] == last).all())
    assert torch.equal(unpack_codes(planes, columns), codes)


def test_unpacking_ignores_the_unused_bits() -> None:
    codes = random_codes(4, 13, 3)
    planes = pack_codes(codes, 3)
    planes[:, :, -1] |= 0b11100000
    assert torch.equal(unpack_codes(planes, 13), codes)


def test_codes_and_planes_need_not_be_contiguous() -> None:
    codes = random_codes(9, 17, 4)
    assert torch.equal(pack_codes(codes.T.contiguous().T, 4), pack_codes(codes, 4))
    planes = pack_codes(codes, 4)
    strided = planes.repeat_interleave(2, dim=2)[:, :, ::2]
    assert torch.equal(unpack_codes(strided, 17), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_first_code_that_does_not_fit_is_refused(bits: int) -> None:
    codes = torch.zeros(2, 5, dtype=torch.uint8)
    codes[1, 4] = 1 << bits
    with pytest.raises(ValueError, match=f"{1 << bits} does not fit in {bits} bits"):
        pack_codes(codes, bits)


@pytest.mark.parametrize("bits", [0, 1, 5, 8])
def test_unsupported_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        pack_codes(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="bits"):
        unpack_codes(torch.zeros(bits, 1, 1, dtype=torch.uint8), 8)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(2, 8, dtype=torch.int64),
        torch.zeros(2, 8, dtype=torch.int8),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(1, 2, 8, dtype=torch.uint8),
    ],
)
def test_codes_of_wrong_dtype_or_rank_are_refused(codes: Tensor) -> None:
    with pytest.raises(ValueError, match="codes: expected uint8"):
        pack_codes(codes, 2)


@pytest.mark.parametrize(
    "planes",
    [torch.zeros(2, 3, 1, dtype=torch.int32), torch.zeros(3, 1, dtype=torch.uint8)],
)
def test_planes_of_wrong_dtype_or_rank_are_refused(planes: Tensor) -> None:
    with pytest.raises(ValueError, match="planes: expected uint8"):
        unpack_codes(planes, 8)


@pytest.mark.parametrize("columns", [8, 17])
def test_planes_of_wrong_width_are_refused(columns: int) -> None:
    planes = pack_codes(random_codes(2, 9, 2), 2)
    with pytest.raises(ValueError, match=f"{columns} columns need"):
        unpack_codes(planes, columns)
