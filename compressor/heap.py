"""Freed memory back to the system, so that a run holds what it uses and no more."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def return_freed_memory() -> None:
    """Hand the C library's free pages back.

    glibc keeps what is freed for the next allocation, in pieces between live tensors. Block after
    block of tensors of many sizes, that grew to half as much again as was in use. Its settings (a
    fixed ``M_MMAP_THRESHOLD``) would bound it too, but at a page fault for every page of every
    temporary.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """glibc's function; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
