"""Tables as integers of 8 or of 16 bits, for processors that multiply those fastest.

A row's entries share one scale. A token's activations are made integers by the kernel such that no
sum of 32 bits overflows; so those are exact.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from spallm_serve.kernels.cpu.library import LEVELS, best_level, library
from spallm_serve.kernels.native import NativeLibraryError

# 8 or 16: tables are held as integers of so many bits; 0: never. Else as is multiplied fastest.
INTEGERS_VARIABLE = "SPALLM_CPU_INTEGERS"
# The largest entry of a row (kLargestByte and kLargestWord in csrc/integers.h).
LARGEST_ENTRY = {torch.int8: 127, torch.int16: 4096}
# What kernels call them (Type in csrc/layout.h).
INTEGER_TYPES = {torch.int16: 3, torch.int8: 4}
_BY_BITS = {"8": torch.int8, "16": torch.int16}
# Entries at a time: their float32 stays in the cache, and is not new memory each time.
_PART = 1 << 16


def to_integers(tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest entries that are whole multiples of a row's scale.

    In 16 bits it is the finest that the row's largest entry allows; in 8 that of several, some of
    them up to a fifth coarser, with which the least is rounded away.

    Args:
        tables: floating point ``[..., out, groups, 2**bits]``, on the CPU.
        dtype: of the integers, int8 or int16.

    Returns:
        Integers of the same shape, in each row up to :data:`LARGEST_ENTRY` in size; and the scales,
        float32 ``[..., out]``. A row with an entry that is no number has a scale that is none.
    """
    whole, scales = _unfilled(tables.shape, dtype)
    _convert(tables, whole, scales)
    return whole, scales


def to_integers_together(
    tables: Sequence[Tensor], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """What :func:`to_integers` gives for each, in memory that all share.

    Args:
        tables: ``[out, groups, 2**bits]`` each, with the same groups and bits.
        dtype: of the integers, int8 or int16.
    """
    rows = [len(each) for each in tables]
    whole, scales = _unfilled(torch.Size([sum(rows), *tables[0].shape[1:]]), dtype)
    parts = [*zip(whole.split(rows), scales.split(rows), strict=True)]
    for each, part in zip(tables, parts, strict=True):
        _convert(each, *part)
    return parts


def _unfilled(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for integers and scales; of these dtypes whatever torch's default is just now."""
    return (
        torch.empty(shape, dtype=dtype, device="cpu"),
        torch.empty(shape[:-2], dtype=torch.float32, device="cpu"),
    )


def _convert(tables: Tensor, whole: Tensor, scales: Tensor) -> None:
    """In a few calls and not a dozen: adapters are read beside an engine that decodes, and each may
    have to wait for the interpreter, or have the engine wait for it."""
    entries = tables.shape[-2:].numel()
    rows = max(1, _PART // entries)
    parts = tables.contiguous().view(-1, entries).split(rows)
    into = whole.view(-1, entries).split(rows), scales.view(-1).split(rows)
    for part, whole_part, its_scales in zip(parts, *into, strict=True):
        values = part.float()
        library().spallm_tables_to_integers(
            values.data_ptr(), len(values), entries, INTEGER_TYPES[whole.dtype],
            whole_part.data_ptr(), its_scales.data_ptr(),
        )  # fmt: skip


def from_integers(values: Tensor, scales: Tensor) -> Tensor:
    """float32 of what :func:`to_integers` gave."""
    return values * scales[..., None, None]


def why_no_integers(dtype: torch.dtype, level: int | None = None) -> str | None:
    """Why tables cannot be held as such integers; None if they can.

    Args:
        dtype: int8 or int16.
        level: position of the instructions in ``LEVELS``; None for the processor's best.
    """
    try:
        level = best_level() if level is None else level
        able = bool(library().spallm_cpu_integers(level, INTEGER_TYPES[dtype]))
    except NativeLibraryError as error:
        return str(error)
    if able:
        return None
    bits = torch.iinfo(dtype).bits
    return (
        f"there are no faster products of {bits}-bit integers with {LEVELS[level]}, which is what "
        "runs here"
    )


def fastest_integers(level: int | None = None) -> torch.dtype | None:
    """The integers that are multiplied fastest; None where none are faster than float32.

    Args:
        level: as for :func:`why_no_integers`.
    """
    able = (dtype for dtype in _BY_BITS.values() if why_no_integers(dtype, level) is None)
    return next(able, None)


def wanted_integers() -> torch.dtype | bool:
    """The integers that tables are to be held as; False: none; True: what is fastest.

    Raises:
        ValueError: the environment says neither.
    """
    said = os.environ.get(INTEGERS_VARIABLE, "")
    if said in _BY_BITS:
        return _BY_BITS[said]
    if said not in ("", "0"):
        raise ValueError(f"{INTEGERS_VARIABLE}={said!r}: expected 0, 8 or 16, or unset it")
    return said == ""
