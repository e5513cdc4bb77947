"""Find and load the compiled kernels; no torch headers and one OpenMP runtime in the process."""

from __future__ import annotations

import ctypes
import sysconfig
from functools import cache
from pathlib import Path

LEVELS = ("scalar", "avx2", "avx512")

_POINTER, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_CODES = (_POINTER, _I64, _I64, _I64, _I32)  # codes, rows, columns, groups, bits
_FUNCTIONS = {
    "spallm_cpu_level": (_I32, ()),
    # tables, type, slots; x, type, tokens; slots; bias, type; y; level
    "spallm_lut_linear": (
        _I64,
        (*_CODES, _POINTER, _I32, _I64, _POINTER, _I32, _I64, _POINTER, _POINTER, _I32, _POINTER,
         _I32),
    ),
    # tables, type; out, type; level
    "spallm_decode": (None, (*_CODES, _POINTER, _I32, _POINTER, _I32, _I32)),
    # planes, rows, columns, groups, bits; packed
    "spallm_pack": (None, (*_CODES, _POINTER)),
    "spallm_unpack": (None, (*_CODES, _POINTER)),
    # values; sums; level
    "spallm_bucket_sums": (None, (*_CODES, _POINTER, _POINTER, _I32)),
}  # fmt: skip


class NativeLibraryError(RuntimeError):
    """The compiled kernels are not there or do not load; says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels with their signatures.

    Raises:
        NativeLibraryError: not built (no compiler when the package was installed), or not loadable.
    """
    built = Path(__file__).parent / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.is_file():
        raise NativeLibraryError(
            "the native kernels were not built; install a C++ compiler with OpenMP and then this "
            "package again"
        )
    _share_openmp()
    try:
        native = ctypes.CDLL(str(built))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(native, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(
            f"the native kernels do not load ({error}); install this package again"
        ) from error
    return native


@cache
def best_level() -> int:
    """Position in :data:`LEVELS` of the best instructions that this processor has."""
    return int(library().spallm_cpu_level())


def _share_openmp() -> None:
    """Offer the OpenMP runtime that torch has loaded to the kernels, which name none of their own.

    Two runtimes would be two thread pools fighting for the cores; with one,
    ``torch.set_num_threads`` counts for the kernels too.
    """
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for line in mapped:
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libgomp"):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
