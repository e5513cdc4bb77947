"""Gated MLPs that keep their two inner tensors for the backward pass, not all four."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from spallm_serve.models import decoder_blocks

Activation = Callable[[Tensor], Tensor]

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
_PROBE_TOKENS = 4


def recompute_gated_products(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Keep only ``gate(x)`` and ``up(x)`` of each ``down(act(gate(x)) * up(x))``.

    autograd would keep four tensors of the inner width: these two, the activated gate, and what
    goes into ``down_proj`` where its tables are trained. The last two take a pass over the first
    two to make again, and are over a fourth of all that a Llama block keeps. Results and gradients
    are the same to the bit.

    Args:
        model: with the trainable parts in place. Modules that are built otherwise stay as they are.
        dtype: of the activations; what is trained may be of another.

    Returns:
        How many MLPs it was done in.
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    probe = torch.randn(1, _PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))
    probe = probe.to(model.device, dtype)
    modules = [module for block in decoder_blocks(model)[1] for module in block.modules()]
    gated = [module for module in modules if is_gated(module, probe)]
    for module in gated:
        module.forward = partial(_forward, module, _keeps_input(module, probe))  # type: ignore[method-assign]
    return len(gated)


@torch.no_grad()
def is_gated(module: nn.Module, probe: Tensor, error: float = 0.0) -> bool:
    """Whether a module is an MLP that computes what its parts' names promise, tried on vectors.

    Args:
        module: any.
        probe: ``[rows, tokens, in]`` in the dtype of its activations.
        error: relative, that is allowed (a fused activation rounds elsewhere); 0 is to the bit.
    """
    if any(getattr(module, part, None) is None for part in _PARTS):
        return False
    found, wanted = module(probe), _forward(module, False, probe)
    if error == 0:
        return torch.equal(found, wanted)
    return found.shape == wanted.shape and bool((found - wanted).norm() <= error * wanted.norm())


def _keeps_input(mlp: Any, probe: Tensor) -> bool:
    """Whether ``down_proj`` keeps what it is given for its backward pass, and not a copy or part.

    With gradients enabled, as in training; nothing is computed backwards.
    """
    inner = mlp.act_fn(mlp.gate_proj(probe)) * mlp.up_proj(probe)
    inner = inner.detach().requires_grad_()
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp.down_proj(inner)
    return inner.untyped_storage().data_ptr() in kept


def _forward(mlp: Any, down_keeps_input: bool, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    inner: Tensor = _GatedProduct.apply(gate, up, mlp.act_fn)
    y: Tensor = mlp.down_proj(inner)
    # Where gate and up take no gradient they are not kept, and this would keep them.
    if down_keeps_input and inner.requires_grad and y.requires_grad:
        _free_between_passes(inner, y)
    return y


def _free_between_passes(inner: Tensor, y: Tensor) -> None:
    """Free the memory of ``inner``, fill it again once the gradient of ``y`` is there, and free it
    for good once its own is."""
    node: Any = inner.grad_fn
    # Not the tensor itself: filling that would count as a change of what autograd has saved.
    values = inner.data
    storage = values.untyped_storage()
    size = storage.nbytes()

    def fill(dy: Tensor) -> None:
        storage.resize_(size)
        gate, up = node.saved_tensors
        with torch.no_grad():
            torch.mul(node.activation(gate), up, out=values)

    def free(_: Tensor | None = None) -> None:
        storage.resize_(0)

    free()
    y.register_hook(fill)
    inner.register_hook(free)


class _GatedProduct(torch.autograd.Function):
    """``activation(gate) * up``, of which the backward pass keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            # Not autograd.grad: an activation's hooks, such as a profiler's, may not run in it.
            (ctx.activation(gate) * up).backward(gradient)
        return gate.grad, up.grad, None
