"""What every backend's arguments must be; checked once, before any of them runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spallm_serve.kernels.packing import SUPPORTED_BITS


def bits_of(tables: Tensor) -> int:
    """Bits of the codes that tables ``[..., 2**bits]`` are for.

    Raises:
        ValueError: the number of entries is not 4, 8 or 16.
    """
    entries = tables.shape[-1] if tables.dim() else 0
    bits = entries.bit_length() - 1
    if bits not in SUPPORTED_BITS or entries != 1 << bits:
        raise ValueError(
            f"tables: expected 4, 8 or 16 entries in the last dimension, got {list(tables.shape)}"
        )
    return bits


def check_forward(
    x: Tensor, rows: int, tables: Tensor, slots: Tensor | None, bias: Tensor | None
) -> None:
    """Check what does not depend on how the codes are laid out; no pass over any data.

    Args:
        x: the activations.
        rows: how many the codes have.
        tables, slots, bias: see ``lut_linear``.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point [tokens, in], got {_seen(x)}")
    if not x.is_contiguous():
        raise ValueError(f"x: expected contiguous memory, got strides {x.stride()}")
    if tables.dim() != 4 or not tables.is_floating_point():
        raise ValueError(
            f"tables: expected floating point [n_slots, out, groups, 2**bits], got {_seen(tables)}"
        )
    if tables.shape[0] < 1 or tables.shape[1] != rows:
        raise ValueError(
            f"tables: expected at least one slot of {rows} rows (the codes have as many), "
            f"got {list(tables.shape)}"
        )
    if tables.shape[2] < 1 or x.shape[1] % tables.shape[2]:
        raise ValueError(
            f"tables: expected a number of groups that divides x's {x.shape[1]} columns, "
            f"got {tables.shape[2]}"
        )
    _check_beside(tables, "tables", x)
    if slots is not None:
        if slots.dtype != torch.int32 or slots.shape != x.shape[:1]:
            raise ValueError(f"slots: expected int32 [{x.shape[0]}], got {_seen(slots)}")
        _check_beside(slots, "slots", x)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != rows or not bias.is_floating_point():
            raise ValueError(f"bias: expected floating point [{rows}], got {_seen(bias)}")
        _check_beside(bias, "bias", x)


def check_code_rows(codes: Tensor, wanted: int, columns: int, groups: int, bits: int) -> None:
    """Refuse codes whose rows are of another length than the layer's layout gives.

    Args:
        codes: ``[1 + out, length]``, a header and a row an output.
        wanted: the length, in elements of the codes' dtype.
        columns, groups, bits: of the layer.

    Raises:
        ValueError: what was expected and what came.
    """
    if codes.shape[1] != wanted or not codes.is_contiguous():
        unit = str(codes.dtype).removeprefix("torch.")
        raise ValueError(
            f"codes: expected contiguous rows of {wanted} {unit} for {bits} bits (the tables have "
            f"{1 << bits} entries), {columns} columns and {groups} groups, got "
            f"{list(codes.shape)} with strides {codes.stride()}"
        )


def check_types(
    x: Tensor, tables: Tensor, bias: Tensor | None, supported: Iterable[torch.dtype]
) -> None:
    """Refuse floating point types that a backend has no kernels for.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    for name, tensor in (("x", x), ("tables", tables), ("bias", bias)):
        if tensor is not None and tensor.dtype not in supported:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
            raise ValueError(f"{name}: expected {expected}, got {tensor.dtype}")


def check_slots_in_range(slots: Tensor | None, count: int) -> None:
    """Refuse slots that have no tables; a pass over the slots.

    Raises:
        ValueError: the first one out of range.
    """
    if slots is None:
        return
    outside = (slots < 0) | (slots >= count)
    if bool(outside.any()):
        raise slot_error(slots, int(outside.int().argmax()), count)


def slot_error(slots: Tensor, token: int, count: int) -> ValueError:
    """The error for a token whose slot has no tables."""
    return ValueError(
        f"slots: expected 0 to {count - 1} (tables for {count} slots), "
        f"got {int(slots[token])} for token {token}"
    )


def _check_beside(tensor: Tensor, name: str, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} as x is, got on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory, got strides {tensor.stride()}")


def _seen(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
