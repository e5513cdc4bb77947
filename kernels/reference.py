"""Codes and tables to weights in plain torch: the oracle that every backend is tested against."""

from __future__ import annotations

from torch import Tensor


def dequantize(codes: Tensor, tables: Tensor) -> Tensor:
    """The dense weight that codes and tables stand for; differentiable in ``tables``.

    ``w[r, j] = tables[r, j // (in / groups), codes[r, j]]`` (SpaLLM, section 2.2: theta = Pi w).
    The gradient of a table entry is the sum over all the weights that share it.

    Args:
        codes: uint8 ``[out, in]``.
        tables: floating point ``[out, groups, 2**bits]``; ``groups`` divides ``in``.

    Returns:
        ``[out, in]`` in the dtype of ``tables``.
    """
    rows, columns = codes.shape
    groups = tables.shape[1]
    index = codes.view(rows, groups, columns // groups).long()
    return tables.gather(2, index).view(rows, columns)
