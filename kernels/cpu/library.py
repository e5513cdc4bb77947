"""The compiled CPU kernels of this package."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from spallm_serve.kernels.native import load_native

LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")

_POINTER, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_CODES = (_POINTER, _I64, _I64, _I64, _I32)  # codes, rows, columns, groups, bits
_FUNCTIONS = {
    "spallm_cpu_level": (_I32, ()),
    "spallm_cpu_integers": (_I32, (_I32, _I32)),  # level, type
    # tables, rows, entries of a row; type; integers, scales
    "spallm_tables_to_integers": (None, (_POINTER, _I64, _I64, _I32, _POINTER, _POINTER)),
    # tables, type, scales, slots; x, type, tokens; slots; bias, type; y; level
    "spallm_lut_linear": (
        _I64,
        (*_CODES, _POINTER, _I32, _POINTER, _I64, _POINTER, _I32, _I64, _POINTER, _POINTER, _I32,
         _POINTER, _I32),
    ),
    # tables, type; out, type; level
    "spallm_decode": (None, (*_CODES, _POINTER, _I32, _POINTER, _I32, _I32)),
    # planes, rows, columns, groups, bits; packed
    "spallm_pack": (None, (*_CODES, _POINTER)),
    "spallm_unpack": (None, (*_CODES, _POINTER)),
    # weight, rows, columns; x, tokens; y; level
    "spallm_dense_linear": (None, (_POINTER, _I64, _I64, _POINTER, _I64, _POINTER, _I32)),
    # values, type; sums; level
    "spallm_bucket_sums": (None, (*_CODES, _POINTER, _I32, _POINTER, _I32)),
}  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels with their signatures.

    Raises:
        NativeLibraryError: not built, or not loadable.
    """
    return load_native(Path(__file__).parent, _FUNCTIONS)


@cache
def best_level() -> int:
    """Position in :data:`LEVELS` of the best instructions that this processor has."""
    return int(library().spallm_cpu_level())
