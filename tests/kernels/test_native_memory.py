"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from spallm_serve.kernels import cpu

SOURCES = Path(cpu.__file__).parent / "csrc"
PROGRAM = Path(__file__).parent / "native" / "exercise.cpp"


def test_kernels_stay_inside_their_buffers(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "exercise"
    build = [
        compiler, "-O0", "-g1", "-std=c++17", "-fopenmp", "-fno-sanitize-recover=all",
        "-fsanitize=address,undefined", f"-I{SOURCES}", str(PROGRAM),
        *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no sanitizer: {built.stderr.splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == "done\n"
