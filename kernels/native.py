"""Load C++ that was compiled when the package was installed; one OpenMP runtime in the process.

The libraries are built without torch's headers and name no OpenMP runtime of their own; they are
called through ctypes.
"""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class NativeLibraryError(RuntimeError):
    """A compiled library is not there or does not load; says why."""


def load_native(folder: Path, functions: Mapping[str, tuple[Any, Sequence[Any]]]) -> ctypes.CDLL:
    """The library ``_native`` of a folder, its functions with their signatures.

    Args:
        folder: of the package that the library belongs to.
        functions: name -> (ctypes result, ctypes arguments).

    Raises:
        NativeLibraryError: not built (no compiler when the package was installed), or not loadable.
    """
    built = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.is_file():
        raise NativeLibraryError(
            "the native kernels were not built; install a C++ compiler with OpenMP and then this "
            "package again"
        )
    _share_openmp()
    try:
        native = ctypes.CDLL(str(built))
        for name, (result, arguments) in functions.items():
            function = getattr(native, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(
            f"the native kernels do not load ({error}); install this package again"
        ) from error
    return native


def _share_openmp() -> None:
    """Offer the OpenMP runtime that torch has loaded to libraries, which name none of their own.

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
