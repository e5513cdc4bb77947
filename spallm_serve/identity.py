"""Which base an adapter belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spallm_serve.checkpoint import verify_checkpoint
from spallm_serve.layers import SketchedEmbedding, SketchedLinear
from spallm_serve.models import (
    ModelSource,
    decoder_blocks,
    linears,
    read_parameter,
    skeleton,
    weight_of,
)
from spallm_serve.sketch import base_digest


def base_identity(model: PreTrainedModel) -> str:
    """The base digest of a loaded model.

    Of a compressed one it is that of its codes, as its ``config.json`` has it. A dense one has
    none on disk; its is a sha256 over names, shapes and bfloat16 values of the linears in its
    blocks.

    Returns:
        64 hexadecimal digits.
    """
    sketched = {
        name: module.planes() if isinstance(module, SketchedLinear) else module.codes
        for name, module in model.named_modules()
        if isinstance(module, SketchedLinear | SketchedEmbedding)
    }
    if sketched:
        return base_digest(sketched)
    prefix, blocks = decoder_blocks(model)
    return _dense_identity(
        (f"{prefix}.{name}", weight_of(linear)) for name, linear in sorted(linears(blocks).items())
    )


def stored_identity(source: ModelSource) -> str:
    """:func:`base_identity` of a model on disk, read one tensor at a time.

    Raises:
        UserError: damaged: codes with another digest than the one written, or a weight that is not
            there, has another shape or is not finite.
    """
    if getattr(source.config, "quantization_config", None) is not None:
        return verify_checkpoint(source.directory).base_digest
    prefix, blocks = decoder_blocks(skeleton(source.config))
    names = ((f"{prefix}.{name}", linear) for name, linear in sorted(linears(blocks).items()))
    return _dense_identity((name, stored_weight(source, name, linear)) for name, linear in names)


def stored_weight(source: ModelSource, name: str, linear: nn.Module) -> Tensor:
    """A dense linear's weight from disk, ``[out, in]`` in the dtype it is stored in.

    Args:
        source: holds it.
        name: the linear's in the model.
        linear: of a skeleton.

    Raises:
        UserError: it is not there, has another shape, or is not finite.
    """
    shape = tuple(weight_of(linear).shape)
    if isinstance(linear, Conv1D):
        return read_parameter(source, f"{name}.weight", shape[::-1]).T
    return read_parameter(source, f"{name}.weight", shape)


def _dense_identity(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Of the linears in the blocks, ``[out, in]`` each, in the order of their names."""
    digest = hashlib.sha256(b"dense\n")
    for name, weight in weights:
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        # The same for a model loaded in float32 as for one in the bfloat16 it is stored in.
        values = weight.to(torch.bfloat16).contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
