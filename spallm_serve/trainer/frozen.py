"""A frozen model through which gradients flow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def inputs_that_take_gradients(model: PreTrainedModel) -> Iterator[None]:
    """While open, what the token embedding gives requires a gradient, so that every layer has one
    to pass on although no parameter below it is trained."""

    def ask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(ask)
    try:
        yield
    finally:
        handle.remove()
