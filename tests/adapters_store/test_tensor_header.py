"""The header is judged by itself: safetensors' own checks come after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spallm_serve.adapters_store.failures import RejectedError
from spallm_serve.adapters_store.tensor_header import read_header
from tests.adapters_store.malformed import pack

HALVES = {"dtype": "F16", "shape": [2]}


def header(tmp_path: Path, *offsets: tuple[int, int], nbytes: int = 8) -> list[tuple[int, int]]:
    """Where the tensors are, counted from the end of the header."""
    entries = {f"t{n}": HALVES | {"data_offsets": list(pair)} for n, pair in enumerate(offsets)}
    path = tmp_path / "tensors"
    path.write_bytes(pack(entries, bytes(nbytes)))
    start = path.stat().st_size - nbytes
    return [(tensor.begin - start, tensor.end - start) for tensor in read_header(path)]


def test_tensors_that_fill_the_file_in_any_order(tmp_path: Path) -> None:
    assert header(tmp_path, (4, 8), (0, 4)) == [(0, 4), (4, 8)]


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([(0, 4), (0, 4)], "overlap t1"),
        ([(0, 4), (2, 6)], "overlap t1"),
        ([(0, 4), (5, 9)], "leave a gap before t1"),
        ([(4, 8)], "leave a gap before t0"),
        ([(0, 4)], "something hides"),
        ([(0, 4), (4, 8), (8, 12)], "cut off"),
        ([(0, 5), (5, 8)], "takes 4 bytes, not the 5"),
    ],
)
def test_tensors_that_do_not(offsets: list[tuple[int, int]], said: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=said):
        header(tmp_path, *offsets)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"a": {"dtype": "F16"}}', "\x00", "{}"])
def test_what_is_no_header(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    path.write_bytes(pack(text, b""))
    with pytest.raises(RejectedError):
        read_header(path)


def test_a_header_that_promises_more_than_there_is_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    path.write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    with pytest.raises(RejectedError, match="cut off"):
        read_header(path)
