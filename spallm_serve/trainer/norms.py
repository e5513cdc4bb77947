"""Normalisations trained in float32 inside a model of another dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Rounded(nn.Module):
    """The parameter that a module sees, from the float32 one that is trained."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, trained: Tensor) -> Tensor:
        return trained.to(self.dtype)


def in_float32(norm: nn.Module) -> dict[str, nn.Parameter]:
    """Give a normalisation float32 parameters that take a gradient; it computes with them rounded
    to the dtype it had, and so at first what it did before.

    Returns:
        What is trained, by the parameters' names in the module.
    """
    trained = {}
    for name, parameter in list(norm.named_parameters(recurse=False)):
        rounded = _Rounded(parameter.dtype)
        setattr(norm, name, nn.Parameter(parameter.detach().float()))
        # Not safe in torch's words, because the dtype is another.
        parametrize.register_parametrization(norm, name, rounded, unsafe=True)
        trained[name] = norm.get_parameter(f"parametrizations.{name}.original")
    return trained
