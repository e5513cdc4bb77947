"""Bad arguments of the operation: each is named, with what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from spallm_serve.kernels import lut_linear, prepare_codes
from spallm_serve.kernels.cpu.library import LEVELS
from tests.kernels.cases import (
    force,
    make_case,
    prepared,
    skip_where_slots_go_unread,
)

BAD = {
    "x of integers": ({"x": torch.ones(6, 74, dtype=torch.int32)}, "x: expected floating point"),
    "x of three dimensions": ({"x": torch.ones(1, 6, 74)}, r"x: expected .*\[1, 6, 74\]"),
    "x not contiguous": ({"x": torch.ones(74, 6).T}, "x: expected contiguous"),
    "x of another width": ({"x": torch.ones(6, 700)}, "codes: expected"),
    "x on another device": ({"x": torch.ones(6, 74, device="meta")}, "on meta"),
    "tables of three dimensions": ({"tables": torch.ones(5, 2, 16)}, "tables: expected"),
    "tables of other rows": ({"tables": torch.ones(3, 4, 2, 16)}, "tables: .* 5 rows"),
    "tables without a slot": ({"tables": torch.ones(0, 5, 2, 16)}, "tables: .*at least one"),
    "tables of other bits": ({"tables": torch.ones(3, 5, 2, 4)}, "codes: .* 4"),
    "tables of 32 entries": ({"tables": torch.ones(3, 5, 2, 32)}, "tables: expected 4, 8 or 16"),
    "tables of 12 entries": ({"tables": torch.ones(3, 5, 2, 12)}, "tables: expected 4, 8 or 16"),
    "tables of other groups": ({"tables": torch.ones(3, 5, 3, 16)}, "tables: .*divides"),
    "tables not contiguous": (
        {"tables": torch.ones(3, 5, 16, 2).transpose(2, 3)}, "tables: expected contiguous",
    ),
    "tables of integers": ({"tables": torch.ones(3, 5, 2, 16).int()}, "tables: expected floating"),
    "slots of int64": ({"slots": torch.zeros(6, dtype=torch.int64)}, "slots: expected int32"),
    "slots of float32": ({"slots": torch.zeros(6)}, "slots: expected int32"),
    "slots of uint32": ({"slots": torch.zeros(6, dtype=torch.uint32)}, "slots: expected int32"),
    "slots of other tokens": ({"slots": torch.zeros(5, dtype=torch.int32)}, r"int32 \[6\]"),
    "slots above": ({"slots": torch.tensor([0, 1, 2, 3, 0, 0]).int()}, "got 3 for token 3"),
    "slots below": ({"slots": torch.tensor([0, -1, 2, 0, 0, 0]).int()}, "got -1 for token 1"),
    "bias of other rows": ({"bias": torch.ones(6)}, r"bias: expected floating point \[5\]"),
    "bias of integers": ({"bias": torch.ones(5).int()}, "bias: expected floating"),
    "codes of floats": ({"codes": torch.ones(5, 64)}, "codes: expected"),
    "codes of one dimension": ({"codes": torch.ones(5).byte()}, "codes: expected"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad: str, backend: str) -> None:
    case = make_case(4)
    given = {
        "x": case.x, "codes": prepared(case), "tables": case.tables, "slots": case.slots,
        "bias": case.bias,
    }  # fmt: skip
    change, message = BAD[bad]
    if bad in ("slots above", "slots below"):
        skip_where_slots_go_unread()
    change = {
        name: value if value.is_meta else value.to(case.x.device) for name, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        lut_linear(**(given | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [6, 100])
@pytest.mark.parametrize("other", [(5, 1, 16), (5, 2, 8)])
def test_codes_laid_out_for_other_tables_are_refused(
    tokens: int, other: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they happen to take as many bytes, only what the codes say of themselves tells."""
    force(monkeypatch, f"cpu-{LEVELS[0]}")
    case = make_case(4, width=16, tokens=tokens)
    with pytest.raises(ValueError, match="codes: "):
        lut_linear(case.x, prepared(case), torch.ones(3, *other), case.slots)


@pytest.mark.parametrize("tokens", [6, 100])
def test_a_slot_out_of_range_is_refused_however_many_tokens(tokens: int, backend: str) -> None:
    skip_where_slots_go_unread()
    case = make_case(4, tokens=tokens)
    assert case.slots is not None
    case.slots[tokens - 1] = 7
    with pytest.raises(ValueError, match=f"expected 0 to 2 .* got 7 for token {tokens - 1}"):
        lut_linear(case.x, prepared(case), case.tables, case.slots)


def test_codes_for_the_cpu_are_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, f"cpu-{LEVELS[0]}")
    case = make_case(4, n_slots=None)
    codes = prepared(case)
    with pytest.raises(ValueError, match="codes: are laid out for the CPU, got on meta"):
        lut_linear(case.x.to("meta"), codes.to("meta"), case.tables.to("meta"))


@pytest.mark.parametrize("groups", [-1, 0, 3])
def test_groups_that_do_not_divide_are_refused(backend: str, groups: int) -> None:
    case = make_case(4, width=64, groups=1)
    with pytest.raises(ValueError, match="groups: expected a divisor of 64 columns"):
        prepare_codes(case.planes, 64, groups)


def test_no_columns_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="columns: expected at least 1"):
        prepare_codes(torch.zeros(4, 16, 0, dtype=torch.uint8), 0, 1)
