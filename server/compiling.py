"""Whether and where a model can be compiled on this machine's processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import stat
import subprocess
import sysconfig
import tempfile
from pathlib import Path

# What the compiler's output needs, in one small library.
_PROBE = """
#include <Python.h>
#include <omp.h>
#include <cmath>
extern "C" int spallm_threads() { return omp_get_max_threads(); }
"""
_PROBE_SECONDS = 60


class CannotCompileError(Exception):
    """Says what is missing."""


def prepare_compiling(cache: Path) -> Path:
    """A folder for what is compiled, after something was compiled and loaded there.

    Args:
        cache: a user's, in which it is made: nobody else may write what this process will load.
            Code for one processor may not run on another that shares the folder, so each has its
            own.

    Raises:
        CannotCompileError: there is no such folder, or no compiler that works.
    """
    ours = cache / "spallm_compiled"
    folder = ours / _processor()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Who owns a folder can put another in the place of what is in it.
        for each in (ours, folder):
            _make_private(each)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _try_compiler(Path(scratch))
    except OSError as error:
        raise CannotCompileError(f"{folder} cannot be used: {error}") from error
    return folder


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise CannotCompileError(f"{folder} is a link")
    if found.st_uid != os.getuid():
        raise CannotCompileError(f"{folder} belongs to user {found.st_uid}")
    folder.chmod(0o700)


def _try_compiler(folder: Path) -> None:
    """Compile and load a library as torch does."""
    # One program: torch takes it as such, too.
    compiler = os.environ.get("CXX", "g++")
    source, library = folder / "probe.cpp", folder / "probe.so"
    source.write_text(_PROBE)
    command = [compiler, "-shared", "-fPIC", "-fopenmp", f"-I{sysconfig.get_path('include')}",
               str(source), "-o", str(library)]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompileError(
            f"the C++ compiler {compiler} (or what CXX says) does not run: {error}"
        ) from error
    if done.returncode:
        problems = re.findall(r"^.*error.*$", done.stderr, re.MULTILINE | re.IGNORECASE)
        raise CannotCompileError(f"{compiler}: {(problems or [done.stderr.strip()])[0]}")
    ctypes.CDLL(str(library))


def _processor() -> str:
    """A name for processors that run the same code."""
    try:
        facts = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        facts = ""
    found = re.findall(r"^(?:model name|flags|CPU part|Features)\s*:.*$", facts, re.MULTILINE)
    described = "\n".join([platform.machine(), *found])
    return hashlib.sha256(described.encode()).hexdigest()[:16]
