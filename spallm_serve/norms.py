"""Normalisations trained in float32 inside a model of another dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def in_float32(norm: nn.Module) -> dict[str, nn.Parameter]:
    """Give a normalisation float32 parameters that take a gradient; what it reads and gives keeps
    its dtype.

    Returns:
        The parameters by their name in the module.
    """
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, nn.Parameter(parameter.detach().float()))
    dtypes: list[torch.dtype] = []

    def widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtypes.append(args[0].dtype)
        return (args[0].float(), *args[1:])

    def narrow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(dtypes.pop())

    norm.register_forward_pre_hook(widen)
    norm.register_forward_hook(narrow)
    return dict(norm.named_parameters(recurse=False))
