"""Launch the Triton programs on tensors: grids, block shapes, tuning."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from spallm_serve.kernels.gpu import programs
from spallm_serve.kernels.gpu.layout import units_of
from spallm_serve.kernels.gpu.token_blocks import TokenBlocks, token_blocks

# Sums of buckets take 2**bits accumulators a token, so that many tokens fit into registers.
BUCKET_TOKENS = {2: 64, 3: 32, 4: 16}
# The tensor cores take tokens by sixteens at the least.
_LEAST_TOKENS = 16
_MOST_TOKENS = 128
_GRADIENT_TOKENS = 32

_Shape = dict[str, int]  # ROWS, UNITS, and Triton's num_warps and num_stages


def _shapes(rows: tuple[int, ...], units: tuple[int, ...], warps: tuple[int, ...]) -> list[_Shape]:
    """Every combination, the first of each first; that is taken where nothing can be timed."""
    return [
        {"ROWS": r, "UNITS": u, "num_warps": w, "num_stages": stages}
        for r in rows
        for u in units
        for w in warps
        for stages in (3, 2)
    ]


_CHOICES: dict[str, list[_Shape]] = {
    "one token": _shapes((8, 4, 16), (8, 4), (4, 8)),
    "few tokens": _shapes((16, 32), (2,), (4, 8)),
    "many tokens": _shapes((64,), (1,), (8, 4)),
    "buckets": _shapes((16,), (2, 1), (4, 8)),
    "input gradient": _shapes((32, 64), (2,), (8,)),
    "table gradient": _shapes((64, 32), (2,), (4, 8)),
}


def multiply(
    x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``[tokens, out]`` in the dtype of ``x``; arguments are checked.

    Raises:
        ValueError: more tokens than 32-bit offsets reach.
    """
    tokens = x.shape[0]
    shape = _LayerShape(codes, tables, x.shape[0], x.shape[1])
    y = x.new_empty(tokens, shape.rows)
    if tokens == 0:
        return y
    if slots is not None and tables.shape[0] > 1 and 1 < tokens <= BUCKET_TOKENS[shape.bits]:
        block = _least_block(tokens)
        _run(
            programs.multiply_by_buckets,
            "buckets",
            (x, codes, tables, bias, y, slots, tokens, *shape.sizes, tables.shape[0]),
            lambda meta: (triton.cdiv(tokens, block), triton.cdiv(shape.rows, meta["ROWS"])),
            key=(block, x.dtype, shape.sizes),
            constants={"BITS": shape.bits, "HAS_BIAS": bias is not None, "TOKENS": block},
        )
        return y
    block, blocks, plan = _blocks(slots, tokens, tables.shape[0])
    kind = "one token" if block == 1 else "few tokens" if block < 64 else "many tokens"
    _run(
        programs.multiply_dequantized,
        kind,
        (x, codes, tables, bias, y, *plan, tokens, *shape.sizes, tables.shape[0]),
        lambda meta: (blocks, triton.cdiv(shape.rows, meta["ROWS"])),
        key=(block, x.dtype, shape.sizes),
        constants={
            "BITS": shape.bits,
            "SORTED": slots is not None,
            "HAS_BIAS": bias is not None,
            "TOKENS": block,
        },
    )
    return y


def input_gradient(
    dy: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, columns: int
) -> Tensor:
    """``dy W``: ``[tokens, columns]`` in the dtype of ``dy``."""
    tokens = dy.shape[0]
    shape = _LayerShape(codes, tables, tokens, columns)
    dx = dy.new_empty(tokens, columns)
    if tokens == 0:
        return dx
    block, blocks, plan = _blocks(slots, tokens, tables.shape[0], least=_LEAST_TOKENS)
    _run(
        programs.multiply_transposed,
        "input gradient",
        (dy, codes, tables, dx, *plan, tokens, *shape.sizes, tables.shape[0]),
        lambda meta: (blocks, shape.groups, triton.cdiv(shape.units, meta["UNITS"])),
        key=(block, dy.dtype, shape.sizes),
        constants={"BITS": shape.bits, "SORTED": slots is not None, "TOKENS": block},
    )
    return dx


def table_gradient(
    dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None
) -> Tensor:
    """float32 in the shape of ``tables``; tokens whose slot has no tables count nowhere."""
    shape = _LayerShape(codes, tables, x.shape[0], x.shape[1])
    n_slots, tokens = tables.shape[0], x.shape[0]
    dtables = torch.empty(tables.shape, dtype=torch.float32, device=x.device)
    if slots is None:
        order = None
        counts = torch.zeros(n_slots, dtype=torch.int32, device=x.device)
        counts[0] = tokens
    else:
        # With blocks as large as all tokens there is one a slot.
        plan = token_blocks(slots, n_slots, max(tokens, 1))
        order = plan.order
        counts = torch.zeros(n_slots, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, plan.slot.clamp(max=n_slots - 1).long(), _lengths(plan, n_slots))
    stop = counts.cumsum(0, dtype=torch.int32)
    _run(
        programs.sum_table_gradient,
        "table gradient",
        (dy, x, codes, dtables, order, stop - counts, stop, *shape.sizes),
        lambda meta: (triton.cdiv(shape.rows, meta["ROWS"]), shape.groups, n_slots),
        key=(x.dtype, shape.sizes),
        constants={"BITS": shape.bits, "SORTED": slots is not None, "TOKENS": _GRADIENT_TOKENS},
    )
    return dtables


class _LayerShape:
    """The sizes that all programs take."""

    def __init__(self, codes: Tensor, tables: Tensor, tokens: int, columns: int) -> None:
        self.rows, self.groups, entries = tables.shape[1:]
        if tokens * max(self.rows, columns) >= 1 << 31:
            raise ValueError(
                f"x: expected fewer than {(1 << 31) // max(self.rows, columns)} tokens for "
                f"{self.rows} rows and {columns} columns (offsets are of 32 bits), got {tokens}; "
                "multiply them in parts"
            )
        self.bits = entries.bit_length() - 1
        self.units = units_of(columns, self.groups)
        self.sizes = (self.rows, columns, self.groups, self.units, codes.shape[1])


def _blocks(
    slots: Tensor | None, tokens: int, n_slots: int, least: int = 1
) -> tuple[int, int, tuple[Tensor | None, ...]]:
    """Tokens in a block, how many blocks, and which tokens they are (None: as they come)."""
    wanted = 1 if tokens == 1 == least else _least_block(tokens)
    if slots is None:
        return wanted, triton.cdiv(tokens, wanted), (None, None, None, None)
    if wanted == 1:
        first = torch.zeros(1, dtype=torch.int32, device=slots.device)
        return 1, 1, (first, slots, first, first + 1)
    # Sorted blocks hold one slot's tokens, of which there may be few.
    block = min(wanted, max(_LEAST_TOKENS, _least_block(triton.cdiv(tokens, n_slots))))
    plan = token_blocks(slots, n_slots, block)
    return block, len(plan.slot), (plan.order, plan.slot, plan.start, plan.stop)


def _least_block(tokens: int) -> int:
    return min(_MOST_TOKENS, max(_LEAST_TOKENS, triton.next_power_of_2(tokens)))


def _lengths(plan: TokenBlocks, n_slots: int) -> Tensor:
    lengths = (plan.stop - plan.start).clamp(min=0)
    return torch.where(plan.slot < n_slots, lengths, 0)


def _run(
    program: Any,
    kind: str,
    arguments: tuple[Any, ...],
    grid: Callable[[dict[str, int]], tuple[int, ...]],
    *,
    key: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Launch with the fastest block shape for this key, found the first time it comes up.

    Inside a CUDA graph capture nothing can be timed: run once before, as for any tuned kernel.
    """

    def launch(shape: _Shape) -> None:
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(arguments[0]):
            program[grid](*arguments, **constants, **shape)

    choices = _CHOICES[kind]
    at = (kind, key, tuple(constants.values()))
    if at not in _fastest:
        _fastest[at] = choices[0] if not _can_time() else _time(launch, choices)
    launch(_fastest[at])


_fastest: dict[tuple[Any, ...], _Shape] = {}


def _time(launch: Callable[[_Shape], None], choices: list[_Shape]) -> _Shape:
    timed: list[tuple[float, int]] = []
    for index, shape in enumerate(choices):
        try:
            milliseconds = triton.testing.do_bench(lambda s=shape: launch(s), warmup=5, rep=20)
        except triton.runtime.errors.OutOfResources:
            continue
        timed.append((milliseconds, index))
    return choices[min(timed)[1]]


@cache
def _can_time() -> bool:
    """Whether there is a GPU whose clock counts; the interpreter's does not."""
    return torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
