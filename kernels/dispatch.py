"""``lut_linear`` as a torch operator: checks, fake implementation, gradient.

The operator is what torch.compile, autograd and CUDA graphs see. Where none of them looks on,
:func:`lut_linear` goes to the backend directly: an operator written in Python costs more than a
small layer takes.
"""

from __future__ import annotations

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
        ValueError: an argument of the wrong dtype, shape, device or memory layout, or a slot
            without tables; names it, what was expected and what came.
    """
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled()
        and (x.requires_grad or tables.requires_grad or (bias is not None and bias.requires_grad))
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


@torch.library.custom_op("spallm::lut_linear_backward", mutates_args=())
def _backward_operator(
    dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    backend = _checked(x, codes, tables, slots, None)
    return backend.backward(dy.contiguous(), x, codes, tables, slots)


@_backward_operator.register_fake
def _(
    dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), tables.new_empty(tables.shape, dtype=torch.float32)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    output: Tensor,
) -> None:
    x, codes, tables, slots, bias = inputs
    ctx.save_for_backward(x, codes, tables, slots)  # type: ignore[arg-type]
    ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]


def _gradient(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor
) -> tuple[Tensor, None, Tensor, None, Tensor | None]:
    x, codes, tables, slots = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, dtables = torch.ops.spallm.lut_linear_backward(dy, x, codes, tables, slots)
    bias_dtype = ctx.bias_dtype  # type: ignore[attr-defined]
    dbias = None if bias_dtype is None else dy.sum(0).to(bias_dtype)
    return dx, None, dtables.to(tables.dtype), None, dbias


_operator.register_autograd(_gradient, setup_context=_setup_context)
