"""All C++ under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from spallm_serve import compressor
from spallm_serve.kernels import cpu

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("package", "program"),
    [
        (cpu, TESTS / "kernels/native/exercise.cpp"),
        (compressor, TESTS / "compressor/native/exercise.cpp"),
    ],
    ids=["kernels", "compressor"],
)
def test_native_code_stays_inside_its_buffers(
    package: ModuleType, program: Path, tmp_path: Path
) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = Path(str(package.__file__)).parent / "csrc"
    built = tmp_path / "exercise"
    command = [
        compiler, "-O0", "-g1", "-std=c++17", "-fopenmp", "-fno-sanitize-recover=all",
        "-fsanitize=address,undefined", "-DSPALLM_ONE_LEVEL", "-DSPALLM_SMALL_TILES",
        "-Wno-psabi", f"-I{sources}",
        str(program), *map(str, sorted(sources.glob("*.cpp"))), "-o", str(built),
    ]  # fmt: skip
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode and "cannot find" in compiled.stderr:
        pytest.skip(f"the compiler has no sanitizer: {compiled.stderr.splitlines()[-1]}")
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([built], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == "done\n"
