"""Layers as operators that a compiler does not look into.

What a layer of ours does depends on the slots of a step's tokens and on what is in them, which no
compiled graph may hold. So a graph holds a layer's name, and the layer is found where vLLM keeps
those that attention layers are found by.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

_LIBRARY = torch.library.Library("spallm", "FRAGMENT")
# Before a name, so that none is another layer's.
_OURS = "spallm:"


def make_known(vllm_config: VllmConfig, name: str, layer: Callable[..., Any]) -> None:
    """Let a model's compiled graphs find a layer.

    Args:
        vllm_config: of the model.
        name: what its operator is called with.
        layer: what is done in every step, see the operators.

    Raises:
        ValueError: another layer has the name.
    """
    known = vllm_config.compilation_config.static_forward_context
    if _OURS + name in known:
        raise ValueError(f"two layers are called {name}")
    known[_OURS + name] = layer


def unused_name(vllm_config: VllmConfig, beginning: str) -> str:
    """A name for a layer that has none: the same in every process that loads the same models."""
    known = vllm_config.compilation_config.static_forward_context
    numbers = itertools.count()
    return next(
        name for number in numbers if _OURS + (name := f"{beginning}.{number}") not in known
    )


def linear(x: Tensor, bias: Tensor | None, name: str, rows: int) -> Tensor:
    """``x [..., in] -> [..., rows]`` by a layer that takes ``x`` and ``bias``."""
    y: Tensor = _layer(name)(x, bias)
    return y


def _linear_shape(x: Tensor, bias: Tensor | None, name: str, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def embedding(ids: Tensor, name: str, width: int, dtype: torch.dtype) -> Tensor:
    """``ids [...] -> [..., width]`` in ``dtype`` by a layer that takes ``ids``."""
    rows: Tensor = _layer(name)(ids)
    return rows


def _embedding_shape(ids: Tensor, name: str, width: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, width), dtype=dtype)


def correct_norm(y: Tensor, x: Tensor, name: str) -> None:
    """Overwrite in ``y`` what a normalisation of ``x`` gave, by a layer that takes both."""
    _layer(name)(y, x)


def _nothing(y: Tensor, x: Tensor, name: str) -> None:
    return None


def _layer(name: str) -> Any:
    return get_forward_context().no_compile_layers[_OURS + name]


direct_register_custom_op("slotted_linear", linear, fake_impl=_linear_shape, target_lib=_LIBRARY)
direct_register_custom_op(
    "slotted_embedding", embedding, fake_impl=_embedding_shape, target_lib=_LIBRARY
)
direct_register_custom_op(
    "correct_norm", correct_norm, mutates_args=["y"], fake_impl=_nothing, target_lib=_LIBRARY
)
