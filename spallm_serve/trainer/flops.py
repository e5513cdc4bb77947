"""Floating point operations of a step, counted as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def counted_flops(step: Callable[[], object]) -> int:
    """The operations in the matrix products and attentions of a step, sketched layers' included."""
    with FlopCounterMode(display=False, custom_mapping=spallm_flops()) as counter:
        step()
    return int(counter.get_total_flops())


def _product(x: Any, codes: Any, tables: Any, *_: Any, **__: Any) -> int:
    return 2 * int(x[0] * x[1] * tables[1])


def _input_gradient(dy: Any, codes: Any, tables: Any, slots: Any, columns: int, **_: Any) -> int:
    return 2 * int(dy[0] * dy[1] * columns)


def _table_gradient(dy: Any, x: Any, *_: Any, **__: Any) -> int:
    return 2 * int(dy[0] * dy[1] * x[1])


def spallm_flops() -> dict[Any, Callable[..., int]]:
    """How many operations a sketch's products take, for ``FlopCounterMode(custom_mapping=...)``."""
    return {
        torch.ops.spallm.lut_linear: _product,
        torch.ops.spallm.input_gradient: _input_gradient,
        torch.ops.spallm.table_gradient: _table_gradient,
    }
