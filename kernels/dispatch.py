"""``lut_linear`` as a torch operator: checks, fake implementation, gradient.

The operator is what torch.compile, autograd and CUDA graphs see. Where none of them looks on,
:func:`lut_linear` goes to the backend directly: an operator written in Python costs more than a
small layer takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spallm_serve.kernels.arguments import bits_of, check_forward
from spallm_serve.kernels.backend import Backend
from spallm_serve.kernels.choice import backend_of


def lut_linear(
    x: Tensor,
    codes: Tensor,
    tables: Tensor,
    slots: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply each token by the weight that shared codes and its own slot's tables stand for.

    ``y[t, r] = bias[r] + sum_j tables[slots[t], r, j // (in / groups), code[r, j]] x[t, j]``

    Differentiable in ``x``, ``tables`` and ``bias``.

    Args:
        x: float32, bfloat16 or float16 ``[tokens, in]``, contiguous.
        codes: what ``prepare_codes`` gives, or bit-planes uint8 ``[bits, out, ceil(in / 8)]``.
        tables: ``[n_slots, out, groups, 2**bits]``, contiguous.
        slots: int32 ``[tokens]``; None is slot 0 for all.
        bias: ``[out]``, or None.

    Returns:
        ``[tokens, out]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument of the wrong dtype, shape, device or memory layout, or, on the CPU,
            a slot without tables; names it, what was expected and what came. On a GPU such a
            token's output is NaN: to raise, the device would have to be waited for.
    """
    needs_gradient = torch.is_grad_enabled() and (
        x.requires_grad or tables.requires_grad or (bias is not None and bias.requires_grad)
    )
    # A subclass, such as a fake tensor, has no memory of its own to read; a dispatch mode, such as
    # a counter of operations, sees nothing but operators.
    if (
        torch.compiler.is_compiling()
        or needs_gradient
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        y: Tensor = torch.ops.spallm.lut_linear(x, codes, tables, slots, bias)
        return y
    return _checked(x, codes, tables, slots, bias).lut_linear(x, codes, tables, slots, bias)


def _checked(
    x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
) -> Backend:
    backend = backend_of(codes)
    bits = bits_of(tables)
    check_forward(x, backend.rows(codes), tables, slots, bias)
    if codes.device != x.device:
        raise ValueError(f"codes: expected on {x.device} as x is, got on {codes.device}")
    backend.check(codes, x.shape[1], tables.shape[2], bits)
    return backend


@torch.library.custom_op("spallm::lut_linear", mutates_args=())
def _operator(
    x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
) -> Tensor:
    return _checked(x, codes, tables, slots, bias).lut_linear(x, codes, tables, slots, bias)


@_operator.register_fake
def _(
    x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], tables.shape[1])


@torch.library.custom_op("spallm::input_gradient", mutates_args=())
def _input_gradient(
    dy: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, columns: int
) -> Tensor:
    return backend_of(codes).input_gradient(dy.contiguous(), codes, tables, slots, columns)


@_input_gradient.register_fake
def _(dy: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, columns: int) -> Tensor:
    return dy.new_empty(dy.shape[0], columns)


@torch.library.custom_op("spallm::table_gradient", mutates_args=())
def _table_gradient(
    dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None
) -> Tensor:
    return backend_of(codes).table_gradient(dy.contiguous(), x, codes, tables, slots)


@_table_gradient.register_fake
def _(dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None) -> Tensor:
    return tables.new_empty(tables.shape, dtype=torch.float32)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor
) -> None:
    x, codes, tables, slots, bias = inputs
    # Only the gradient of tables reads the activations: under a frozen base they can go.
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, codes, tables, slots)
    ctx.columns = x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(
    ctx: Any, dy: Tensor
) -> tuple[Tensor | None, None, Tensor | None, None, Tensor | None]:
    x, codes, tables, slots = ctx.saved_tensors
    wants_x, _, wants_tables, _, wants_bias = ctx.needs_input_grad
    operators = torch.ops.spallm
    dx = operators.input_gradient(dy, codes, tables, slots, ctx.columns) if wants_x else None
    dtables = None
    if wants_tables:
        dtables = operators.table_gradient(dy, x, codes, tables, slots).to(tables.dtype)
    return dx, None, dtables, None, dy.sum(0).to(ctx.bias_dtype) if wants_bias else None


_operator.register_autograd(_gradient, setup_context=_setup_context)
