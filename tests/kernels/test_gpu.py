"""What is the GPU kernels' own: their layout, blocks of tokens, and what compiles for real GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spallm_serve.kernels.gpu.layout import from_gpu_layout, to_gpu_layout
from spallm_serve.kernels.packing import pack_codes
from spallm_serve.kernels.reference_backend import ReferenceBackend
from tests.kernels.cases import Case, make_case

pytest.importorskip("triton")

from spallm_serve.kernels.gpu import launch


@settings(max_examples=50, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    rows=st.integers(1, 9),
    width=st.integers(1, 80),
    groups=st.integers(1, 8),
)
def test_layout_and_back(bits: int, rows: int, width: int, groups: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, groups * width), dtype=torch.uint8)
    planes = pack_codes(codes, bits)
    laid = to_gpu_layout(planes, groups * width, groups)
    assert laid.dtype == torch.int32
    assert laid.shape[1] % 4 == 0
    assert torch.equal(from_gpu_layout(laid), planes)


@pytest.fixture
def device() -> Iterator[str]:
    """Where the programs run: a GPU, or interpreted the CPU."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(name):
        yield name


def laid(case: Case) -> Tensor:
    return to_gpu_layout(case.planes, case.x.shape[1], case.tables.shape[2])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [5, 40, 90])
def test_tokens_without_tables_are_poisoned(tokens: int, bits: int, device: str) -> None:
    """A GPU cannot be asked in passing whether a slot is in range; the wrong tokens show, alone.
    Those of 90 tokens that have few slots go by blocks at 4 bits."""
    case = make_case(bits, tokens=tokens)
    assert case.slots is not None
    case.slots[0], case.slots[tokens - 1] = -1, 3
    y = launch.multiply(case.x, laid(case), case.tables, case.slots, case.bias)
    assert bool(y[[0, -1]].isnan().all())
    case.slots[[0, -1]] = 0
    wanted, size = case.wanted()
    assert bool(((y - wanted).abs() <= 1e-5 * size)[1:-1].all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [5, 40, 90])
def test_what_others_have_does_not_matter(tokens: int, bits: int, device: str) -> None:
    """Neither their tables nor their activations, however large."""
    case = make_case(bits, tokens=tokens, n_slots=2)
    assert case.slots is not None
    case.slots[:] = torch.arange(tokens) % 2
    dy = torch.randn(tokens, case.tables.shape[1])
    case.tables[1] = torch.inf
    case.x[1::2] = torch.nan
    y = launch.multiply(case.x, laid(case), case.tables, case.slots, case.bias)
    wanted, size = case.wanted()
    assert bool(((y - wanted).abs() <= 1e-5 * size)[::2].all())
    given = (dy, case.x, laid(case), case.tables, case.slots)
    found = launch.table_gradient(*given)[0]
    alone = launch.table_gradient(dy[::2], case.x[::2], laid(case), case.tables[:1], None)[0]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_slots", [None, 2])
def test_large_layers_are_done_in_parts(
    n_slots: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "DENSE_ROWS", 64)
    monkeypatch.setattr(launch, "GRADIENT_WEIGHTS", 64 * 74)
    monkeypatch.setattr(launch, "MOST_SUMS", 1)
    case = make_case(3, rows=130, tokens=70, n_slots=n_slots)
    codes, dy = laid(case), torch.randn(70, 130)
    y = launch.multiply(case.x, codes, case.tables, case.slots, case.bias)
    wanted, size = case.wanted()
    assert bool(((y - wanted).abs() <= 1e-5 * size).all())
    slots = torch.zeros(70, dtype=torch.int32) if case.slots is None else case.slots
    dx = launch.input_gradient(dy, codes, case.tables, case.slots, case.x.shape[1])
    wanted = torch.einsum("tr,trc->tc", dy.double(), case.weights[slots.long()])
    torch.testing.assert_close(dx.double(), wanted, rtol=1e-4, atol=1e-4)
    found = launch.table_gradient(dy, case.x, codes, case.tables, case.slots)
    wanted = ReferenceBackend().table_gradient(dy, case.x, case.planes, case.tables, case.slots)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_tables_at_an_odd_place(device: str) -> None:
    """Entries are read two at a time; a table may begin between two words."""
    case = make_case(4, dtype=torch.float16, table_dtype=torch.float16)
    shifted = torch.cat([torch.zeros(1).half(), case.tables.flatten()])[1:].view_as(case.tables)
    y = launch.multiply(case.x.float(), laid(case), shifted, case.slots, None)
    expected = launch.multiply(case.x.float(), laid(case), case.tables, case.slots, None)
    assert torch.equal(y, expected)


def test_more_tokens_than_offsets_reach_are_refused() -> None:
    x = torch.empty(1, device="meta").expand(1 << 17, 1 << 14)
    tables = torch.empty(1, 8, 1, 16, device="meta")
    with pytest.raises(ValueError, match="expected fewer than 131072 tokens"):
        launch.multiply(
            x, torch.empty(9, 2048, dtype=torch.int32, device="meta"), tables, None, None
        )


def test_all_programs_compile_for_ampere_and_hopper_without_spilling() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_programs"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert {each["capability"] for each in found} == {80, 90}
    # On Ampere the buckets' four sums leave too few registers by a handful.
    allowed = {("buckets", 80): 64}
    spilling = [
        each
        for each in found
        if each["spills"] > allowed.get((each["program"], each["capability"]), 0)
    ]
    assert spilling == []
