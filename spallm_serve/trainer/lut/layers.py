"""Compressed linears whose tables are trained: all of them, or those of chosen rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spallm_serve.kernels import prepare_codes
from spallm_serve.layers import SketchedLinear


class TunedLinear(nn.Module):
    """A compressed linear with float32 tables that take a gradient.

    float32, whatever the activations are: at small learning rates most steps are below the
    resolution of bfloat16.

    Args:
        base: the compressed layer; its own tables stay as they are.
    """

    def __init__(self, base: SketchedLinear) -> None:
        super().__init__()
        self.base = base
        self.tables = nn.Parameter(base.tables.float())

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in the dtype of x."""
        return self.base.product(x, self.tables)


class TunedRows(nn.Module):
    """A compressed linear of which some rows' tables take a gradient.

    The gradient is only computed for these: ``2 tokens rows in`` operations of what would be
    ``2 tokens out in``.

    Args:
        base: the compressed layer; its own tables stay as they are.
        rows: int32 ``[n]``, ascending.
    """

    rows: Tensor
    planes: Tensor

    def __init__(self, base: SketchedLinear, rows: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("rows", rows.to(base.tables.device))
        planes = base.planes()[:, self.rows].contiguous()
        self.register_buffer("planes", planes, persistent=False)
        self.tables = nn.Parameter(base.tables[self.rows].float())
        self._row_codes: tuple[torch.dtype, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in the dtype of x."""
        tables = self.base.tables.float().index_copy(0, self.rows.long(), self.tables.detach())
        y = self.base.product(x, tables)
        if torch.is_grad_enabled():
            y = _RowGradient.apply(y, x.detach(), self.tables, self._codes(x.dtype), self.rows)
        return y

    def _codes(self, dtype: torch.dtype) -> Tensor:
        """The chosen rows' codes, in the layout of the kernel."""
        if self._row_codes is None or self._row_codes[0] != dtype:
            codes = prepare_codes(self.planes, self.base.columns, self.tables.shape[1], dtype)
            self._row_codes = dtype, codes
        return self._row_codes[1]


class _RowGradient(torch.autograd.Function):
    """Passes y on; backwards it adds the gradient by the tables that made some of y's rows."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, tables: Tensor, codes: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, tables, codes, rows)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, tables, codes, rows = ctx.saved_tensors
        chosen = dy.reshape(-1, dy.shape[-1])[:, rows]
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        gradient = torch.ops.spallm.table_gradient(chosen, flat, codes, tables[None], None)[0]
        return dy, None, gradient, None, None
