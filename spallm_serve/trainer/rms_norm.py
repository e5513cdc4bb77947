"""Frozen RMS normalisations that keep their input as it came, not in float32."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

_PROBE_TOKENS = 4
_EPSILONS = ("variance_epsilon", "eps")


def keep_narrow_inputs(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Let RMS normalisations keep their input in its own dtype of 16 bits.

    autograd keeps the float32 copy they compute with, over a fourth of what a Llama block keeps.
    Results and gradients are the same to the bit, and the backward pass goes over the input less
    often.

    Args:
        model: with the trainable parts in place. Normalisations that are trained, or built
            otherwise than Llama's, stay as they are.
        dtype: of the activations. In float32 there is nothing to save, and nothing is done.

    Returns:
        How many normalisations it was done in.
    """
    if dtype.itemsize > 2:
        return 0
    norms = [module for module in model.modules() if _is_frozen_rms_norm(module, dtype)]
    for norm in norms:
        norm.forward = partial(_forward, norm, norm.forward)  # type: ignore[method-assign]
    return len(norms)


@torch.no_grad()
def _is_frozen_rms_norm(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module computes what :class:`_RmsNorm` does, tried on a few vectors."""
    weight = getattr(module, "weight", None)
    names = [name for name, _ in module.named_parameters()]
    if names != ["weight"] or not isinstance(weight, Tensor) or _epsilon(module) is None:
        return False
    if weight.dim() != 1 or weight.requires_grad or weight.dtype != dtype:
        return False
    if len(signature(module.forward).parameters) != 1:  # a gate, for one
        return False
    probe = torch.randn(_PROBE_TOKENS, len(weight), generator=torch.Generator().manual_seed(0))
    probe = probe.to(weight)
    return torch.equal(module(probe), _RmsNorm.apply(probe, weight, _epsilon(module)))


def _epsilon(module: nn.Module) -> float | None:
    return next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)


def _forward(norm: Any, before: Any, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad and x.dtype == norm.weight.dtype):
        y: Tensor = before(x)
        return y
    normalised: Tensor = _RmsNorm.apply(x, norm.weight, _epsilon(norm))
    return normalised


class _RmsNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x^2) + epsilon)``, in float32 but for the product with the weight.

    The backward pass takes autograd's steps in autograd's order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, scale, weight)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        wide = x.float()
        by_direction = (gradient * weight).float()
        along = (by_direction * wide).sum(-1, keepdim=True)
        by_square = -0.5 * along * scale.pow(3) / x.shape[-1]
        return (by_direction * scale + 2 * wide * by_square).to(x.dtype), None, None
