"""What is the GPU kernels' own: their layout, blocks of tokens, and what compiles for real GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spallm_serve.kernels.gpu.layout import from_gpu_layout, to_gpu_layout
from spallm_serve.kernels.packing import pack_codes
from tests.kernels.test_lut_linear import make_case

pytest.importorskip("triton")


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


@pytest.mark.parametrize("tokens", [5, 90])
def test_tokens_without_tables_are_poisoned(tokens: int) -> None:
    """A GPU cannot be asked in passing whether a slot is in range; the wrong tokens show, alone."""
    from spallm_serve.kernels.gpu import launch

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        case = make_case(2, tokens=tokens)
    assert case.slots is not None
    case.slots[0], case.slots[tokens - 1] = -1, 3
    codes = to_gpu_layout(case.planes, case.x.shape[1], case.tables.shape[2])
    y = launch.multiply(case.x, codes, case.tables, case.slots, case.bias)
    assert bool(y[[0, -1]].isnan().all())
    lone = launch.multiply(case.x[:1].clone(), codes, case.tables, case.slots[:1].clone(), None)
    assert bool(lone.isnan().all())
    case.slots[[0, -1]] = 0
    wanted, size = case.wanted()
    assert bool(((y - wanted).abs() <= 1e-5 * size)[1:-1].all())


def test_more_tokens_than_offsets_reach_are_refused() -> None:
    from spallm_serve.kernels.gpu import launch

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
