"""Gated MLPs that keep their two inner tensors for the backward pass, not all four."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Activation = Callable[[Tensor], Tensor]

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
_PROBE_TOKENS = 4


def recompute_gated_products(model: PreTrainedModel) -> int:
    """Keep only ``gate(x)`` and ``up(x)`` of each ``down(act(gate(x)) * up(x))``.

    autograd would keep four tensors of the inner width: these two, the activated gate, and what
    goes into ``down_proj`` where that is trained. The last two take a pass over the first two to
    make again, and are over a fourth of all that a Llama block keeps. Results and gradients are
    the same to the bit.

    Args:
        model: with the trainable parts in place. Modules that are built otherwise stay as they are.

    Returns:
        How many MLPs it was done in.
    """
    width = model.config.get_text_config().hidden_size
    probe = torch.randn(1, _PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))
    probe = probe.to(model.device, model.dtype)
    gated = [module for module in model.modules() if _is_gated(module, probe)]
    for module in gated:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    return len(gated)


@torch.no_grad()
def _is_gated(module: nn.Module, probe: Tensor) -> bool:
    """Whether a module computes what its parts' names promise, tried on a few vectors."""
    if any(getattr(module, part, None) is None for part in _PARTS):
        return False
    return torch.equal(module(probe), _forward(module, probe))


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    inner: Tensor = _GatedProduct.apply(gate, up, mlp.act_fn)
    y: Tensor = mlp.down_proj(inner)
    kept_by_down = any(parameter.requires_grad for parameter in mlp.down_proj.parameters())
    # Where the gate and up take no gradient they are not kept, and this would keep them.
    if kept_by_down and inner.requires_grad and y.requires_grad:
        _make_again_when_needed(inner, y, gate.detach(), up.detach(), mlp.act_fn)
    return y


def _make_again_when_needed(
    inner: Tensor, y: Tensor, gate: Tensor, up: Tensor, activation: Activation
) -> None:
    """Free the memory of ``inner``, and fill it again once the gradient of ``y`` is there."""
    # Not the tensor itself: filling that would count as a change of what autograd has saved.
    values = inner.data
    storage = values.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)

    def fill(dy: Tensor) -> None:
        storage.resize_(size)
        with torch.no_grad():
            torch.mul(activation(gate), up, out=values)

    y.register_hook(fill)


class _GatedProduct(torch.autograd.Function):
    """``activation(gate) * up``, of which the backward pass keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        gate, up = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            # Not autograd.grad: an activation's hooks, such as a profiler's, may not run in it.
            (ctx.activation(gate) * up).backward(gradient)
        return gate.grad, up.grad, None
