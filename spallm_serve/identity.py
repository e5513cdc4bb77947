"""Which base an adapter belongs to."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

from spallm_serve.layers import SketchedEmbedding, SketchedLinear
from spallm_serve.models import decoder_blocks, linears, weight_of
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
    digest = hashlib.sha256(b"dense\n")
    prefix, blocks = decoder_blocks(model)
    for name, linear in sorted(linears(blocks).items()):
        weight = weight_of(linear)
        digest.update(f"{prefix}.{name} {list(weight.shape)}\n".encode())
        # The same for a model loaded in float32 as for one in the bfloat16 it is stored in.
        values = weight.to(torch.bfloat16).contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
