"""Compress the token embedding and the output head, which lie outside the blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.compressor.hessian import settle_dead_columns
from spallm_serve.compressor.plan import PlannedLayer
from spallm_serve.compressor.record import LayerRecord, layer_record
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.compressor.sketching import curvature, sketch_rows
from spallm_serve.sketch import Sketch


def embedding_hessian(width: int, head_hessian: Tensor | None, reads_ids: bool) -> Tensor:
    """What errors in an embedding matrix cost.

    As an output head it multiplies the final hidden states, whose Hessian counts. As an input
    embedding a row is looked up as it is and all its entries count alike. A tied matrix is both:
    the two, each scaled to a mean diagonal of one, are added.

    Args:
        width: of the hidden states.
        head_hessian: float32 ``[width, width]`` of the final hidden states, or None for an
            embedding that is no head.
        reads_ids: whether the matrix is an input embedding.

    Returns:
        float32 ``[width, width]`` with a positive diagonal.
    """
    total = torch.zeros(width, width)
    if head_hessian is not None:
        total += head_hessian.cpu() / head_hessian.diagonal().mean().cpu().clamp(min=1e-12)
    if reads_ids:
        total += torch.eye(width)
    settle_dead_columns(total)
    return total


def sketch_embedding(
    name: str, weight: Tensor, hessian: Tensor, layer: PlannedLayer, settings: CompressSettings
) -> tuple[Sketch, LayerRecord]:
    """Sketch a matrix ``[vocabulary, width]``.

    Args:
        name: module name.
        weight: floating point.
        hessian: see :func:`embedding_hessian`.
        layer: its planned format.
        settings: of the run.
    """
    shared = curvature(hessian.to(settings.device), settings.damping)
    sketched = sketch_rows(weight, shared, layer.format, settings)
    sketch = Sketch.from_codes(sketched.codes, sketched.tables)
    return sketch, layer_record(name, sketch, sketched.relative_error(), shared.factor, None)
