"""A multiplication with its operands and oracle, on a backend; what the kernels' tests share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from spallm_serve.kernels import lut_linear, prepare_codes
from spallm_serve.kernels.choice import FORCE_VARIABLE
from spallm_serve.kernels.cpu.library import LEVELS, best_level
from spallm_serve.kernels.native import NativeLibraryError
from spallm_serve.kernels.packing import pack_codes
from spallm_serve.kernels.reference import dequantize

BACKENDS = ("reference", *(f"cpu-{level}" for level in LEVELS), "triton")


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """One multiplication with its operands; ``weights`` are those of each slot in float64."""

    x: Tensor
    planes: Tensor
    tables: Tensor
    slots: Tensor | None
    bias: Tensor | None
    codes: Tensor
    weights: Tensor

    def wanted(self) -> tuple[Tensor, Tensor]:
        """The product in float64, and the sum of its terms' magnitudes to compare errors with."""
        slots = torch.zeros(len(self.x), dtype=torch.long) if self.slots is None else self.slots
        chosen, x = self.weights[slots.long()], self.x.detach().double()
        bias = torch.zeros(chosen.shape[1]) if self.bias is None else self.bias.detach()
        return (
            torch.einsum("trc,tc->tr", chosen, x) + bias,
            torch.einsum("trc,tc->tr", chosen.abs(), x.abs()) + bias.abs(),
        )


def make_case(
    bits: int,
    *,
    rows: int = 5,
    width: int = 37,
    groups: int = 2,
    tokens: int = 6,
    n_slots: int | None = 3,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
) -> Case:
    columns = groups * width
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    tables = torch.randn(n_slots or 1, rows, groups, 1 << bits).to(table_dtype)
    return Case(
        torch.randn(tokens, columns).to(dtype),
        pack_codes(codes, bits),
        tables,
        None if n_slots is None else torch.randint(0, n_slots, (tokens,), dtype=torch.int32),
        torch.randn(rows) if bias else None,
        codes,
        torch.stack([dequantize(codes, table) for table in tables.double()]),
    )


def force(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name.startswith("cpu-"):
        try:
            best = best_level()
        except NativeLibraryError as error:
            pytest.skip(str(error))
        if LEVELS.index(name.removeprefix("cpu-")) > best:
            pytest.skip(f"this processor has no {name.removeprefix('cpu-')}")
    if name == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            # Compiled, not interpreted: everything a test makes from here on lies on the GPU.
            torch.set_default_device("cuda")
    monkeypatch.setenv(FORCE_VARIABLE, name)


def skip_where_slots_go_unread() -> None:
    if torch.get_default_device().type == "cuda":
        pytest.skip("a GPU would have to be waited for: such tokens get NaN, see test_gpu.py")


def prepared(case: Case) -> Tensor:
    return prepare_codes(case.planes, case.x.shape[1], case.tables.shape[2], case.x.dtype)


def assert_right(case: Case) -> None:
    y = lut_linear(case.x, prepared(case), case.tables, case.slots, case.bias)
    wanted, size = case.wanted()
    assert y.dtype == case.x.dtype
    assert y.shape == wanted.shape
    assert bool(((y.double() - wanted).abs() <= TOLERANCE[case.x.dtype] * size + 1e-30).all())
