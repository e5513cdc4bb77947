"""Weights that are kept in bfloat16 and multiplied in float32.

A head takes as long as its bytes take to be read, and a checkpoint's are of bfloat16: on processors
without instructions for it, where everything else is better in float32, half of the time and of the
memory would go into zeros.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from spallm_serve.kernels.cpu.backend import INVARIANT_VARIABLE
from spallm_serve.kernels.cpu.library import best_level, library

# From so many tokens on a product is bound by arithmetic, and the BLAS on parts of the weight in
# float32 is faster.
_BLAS_TOKENS = 64
_PART_WEIGHTS = 4 << 20


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` in float32.

    Of fewer than 64 tokens, or with ``SPALLM_BATCH_INVARIANT=1``, each has the same output to the
    bit whatever others there are.

    Args:
        x: float32 ``[tokens, in]``.
        weight: bfloat16 ``[out, in]``, contiguous.

    Returns:
        float32 ``[tokens, out]``.

    Raises:
        ValueError: other dtypes or shapes, or a weight that is not contiguous.
    """
    if x.dtype != torch.float32 or x.dim() != 2:
        raise ValueError(f"x: expected float32 [tokens, in], got {x.dtype} {list(x.shape)}")
    if weight.dtype != torch.bfloat16 or weight.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"weight: expected bfloat16 [out, {x.shape[1]}], got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"weight: expected contiguous memory, got strides {weight.stride()}")
    x = x.contiguous()
    y = x.new_empty(len(x), len(weight))
    if len(x) < _BLAS_TOKENS or os.environ.get(INVARIANT_VARIABLE) == "1":
        library().spallm_dense_linear(
            weight.data_ptr(), *weight.shape, x.data_ptr(), len(x), y.data_ptr(), best_level()
        )
        return y
    rows = max(1, _PART_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        y[:, part] = F.linear(x, weight[part].float())
    return y
