"""Tables as 16-bit integers, for processors that multiply those fastest.

A row's entries share one scale, and a token's activations another, chosen by the kernel such that
no sum of 32 bits overflows; so those are exact.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from spallm_serve.kernels.cpu.library import LEVELS, best_level, library
from spallm_serve.kernels.native import NativeLibraryError

# 1 or 0: tables are held as integers, or never. Else where those are multiplied faster.
INTEGERS_VARIABLE = "SPALLM_CPU_INTEGERS"
# The largest entry of a row (kLargestEntry in csrc/integers.h).
LARGEST_ENTRY = 4096


def to_integers(tables: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entries that are whole multiples of a row's scale.

    Args:
        tables: floating point ``[..., out, groups, 2**bits]``.

    Returns:
        int16 of the same shape, in each row up to :data:`LARGEST_ENTRY` in size; and the scales,
        float32 ``[..., out]``. A row with an entry that is no number has a scale that is none.
    """
    values = tables.float()
    scales = values.abs().amax((-2, -1)) / LARGEST_ENTRY
    usable = scales > torch.finfo(torch.float32).tiny
    inverse = torch.where(usable, scales.reciprocal(), 0.0)
    whole = (values * inverse[..., None, None]).round_().nan_to_num_(0.0)
    kept = torch.where(usable | scales.isnan(), scales, 0.0)
    return whole.to(torch.int16), kept


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
