"""Tables as 16-bit integers, for processors that multiply those fastest.

A row's entries share one scale, and a token's activations another, chosen by the kernel such that
no sum of 32 bits overflows; so those are exact.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from spallm_serve.kernels.cpu.library import LEVELS, best_level, library
from spallm_serve.kernels.native import NativeLibraryError

# 1 or 0: tables are held as integers, or never. Else where those are multiplied faster.
INTEGERS_VARIABLE = "SPALLM_CPU_INTEGERS"
# The largest entry of a row (kLargestEntry in csrc/integers.h).
LARGEST_ENTRY = 4096
# Entries at a time: their float32 stays in the cache, and is not new memory each time.
_PART = 1 << 16


def to_integers(tables: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entries that are whole multiples of a row's scale.

    Args:
        tables: floating point ``[..., out, groups, 2**bits]``, on the CPU.

    Returns:
        int16 of the same shape, in each row up to :data:`LARGEST_ENTRY` in size; and the scales,
        float32 ``[..., out]``. A row with an entry that is no number has a scale that is none.
    """
    whole, scales = _unfilled(tables.shape)
    _convert(tables, whole, scales)
    return whole, scales


def to_integers_together(tables: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What :func:`to_integers` gives for each, in memory that all share.

    Args:
        tables: ``[out, groups, 2**bits]`` each, with the same groups and bits.
    """
    rows = [len(each) for each in tables]
    whole, scales = _unfilled(torch.Size([sum(rows), *tables[0].shape[1:]]))
    parts = [*zip(whole.split(rows), scales.split(rows), strict=True)]
    for each, part in zip(tables, parts, strict=True):
        _convert(each, *part)
    return parts


def _unfilled(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Memory for integers and scales; of these dtypes whatever torch's default is just now."""
    return (
        torch.empty(shape, dtype=torch.int16, device="cpu"),
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
            values.data_ptr(), len(values), entries, whole_part.data_ptr(), its_scales.data_ptr()
        )


def from_integers(values: Tensor, scales: Tensor) -> Tensor:
    """float32 of what :func:`to_integers` gave."""
    return values * scales[..., None, None]


def why_no_integers(level: int | None = None) -> str | None:
    """Why tables cannot be held as integers; None if they can.

    Args:
        level: position of the instructions in ``LEVELS``; None for the processor's best.
    """
    try:
        level = best_level() if level is None else level
        able = bool(library().spallm_cpu_integers(level))
    except NativeLibraryError as error:
        return str(error)
    if able:
        return None
    return f"there are no faster products of integers with {LEVELS[level]}, which is what runs here"


def integers_are_wanted() -> bool | None:
    """Whether tables are to be held as integers; None where they are if it is faster.

    Raises:
        ValueError: the environment says neither.
    """
    said = os.environ.get(INTEGERS_VARIABLE, "")
    if said not in ("", "0", "1"):
        raise ValueError(f"{INTEGERS_VARIABLE}={said!r}: expected 0 or 1, or unset it")
    return bool(int(said)) if said else None
