"""Codes and tables in plain torch: the oracle that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.kernels.packing import unpack_codes


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


def lut_linear(
    x: Tensor, planes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Multiply each token by the weight that the codes and its slot's tables stand for.

    Args:
        x: floating point ``[tokens, in]``.
        planes: uint8 ``[bits, out, ceil(in / 8)]``, the codes as bit-planes.
        tables: floating point ``[n_slots, out, groups, 2**bits]``.
        slots: int32 ``[tokens]``; None is slot 0 for all.
        bias: floating point ``[out]``, or None.

    Returns:
        ``[tokens, out]`` in the dtype of ``x``.
    """
    codes = unpack_codes(planes, x.shape[1])
    y = x.new_zeros(x.shape[0], codes.shape[0])
    for slot, tokens in slot_runs(slots, x.shape[0]):
        y[tokens] = x[tokens] @ dequantize(codes, tables[slot].to(x.dtype)).T
    return y if bias is None else y + bias.to(x.dtype)


def input_gradient(
    dy: Tensor, planes: Tensor, tables: Tensor, slots: Tensor | None, columns: int
) -> Tensor:
    """Gradient of :func:`lut_linear` by its activations: each token's dy times its weight.

    Args:
        dy: ``[tokens, out]``.
        planes, tables, slots: as the forward pass had them.
        columns: of the activations.

    Returns:
        ``[tokens, columns]`` in the dtype of ``dy``.
    """
    codes = unpack_codes(planes, columns)
    dx = dy.new_zeros(dy.shape[0], columns)
    for slot, tokens in slot_runs(slots, dy.shape[0]):
        dx[tokens] = dy[tokens] @ dequantize(codes, tables[slot].to(dy.dtype))
    return dx


def table_gradient(
    dy: Tensor, x: Tensor, planes: Tensor, tables: Tensor, slots: Tensor | None
) -> Tensor:
    """Gradient of :func:`lut_linear` by its tables.

    ``dtables[s, r, g, k]`` sums ``dy[t, r] x[t, j]`` over the tokens t of slot s and the columns j
    of group g with code k.

    Args:
        dy: ``[tokens, out]``.
        x, planes, tables, slots: as the forward pass had them.

    Returns:
        float32 in the shape of ``tables``.
    """
    codes = unpack_codes(planes, x.shape[1])
    rows, (_, _, groups, entries) = codes.shape[0], tables.shape
    index = codes.view(rows, groups, -1).long()
    dtables = torch.zeros(tables.shape, dtype=torch.float32, device=x.device)
    for slot, tokens in slot_runs(slots, x.shape[0]):
        # In float32: a sum over tokens may be beyond float16's range.
        dweight = (dy[tokens].T.float() @ x[tokens].float()).view(rows, groups, -1)
        dtables[slot] = dweight.new_zeros(rows, groups, entries).scatter_add_(2, index, dweight)
    return dtables


def slot_runs(slots: Tensor | None, tokens: int) -> list[tuple[int, Tensor | slice]]:
    """Each slot that occurs and the tokens it has, in the slots' order."""
    if slots is None:
        return [(0, slice(None))] if tokens else []
    order = slots.argsort(stable=True)
    present, counts = torch.unique_consecutive(slots[order], return_counts=True)
    return list(zip(present.tolist(), order.split(counts.tolist()), strict=True))
