"""All C++ under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from spallm_serve import compressor
from spallm_serve.kernels import cpu
from spallm_serve.kernels.cpu.library import LEVELS, best_level

TESTS = Path(__file__).parent


def is_above(source: Path, level: int) -> bool:
    """Whether a file is of instructions that come behind a level."""
    name = source.stem.split("_")[0]
    return name in LEVELS and LEVELS.index(name) > level


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
    # What this processor cannot run is left out, and asked for by nobody.
    used = sorted(each for each in sources.glob("*.cpp") if not is_above(each, best_level()))
    command = [
        compiler, "-O0", "-g1", "-std=c++17", "-fopenmp", "-DSPALLM_ONE_LEVEL",
        "-DSPALLM_SMALL_TILES", "-Wno-psabi", f"-I{sources}",
        "-fno-sanitize-recover=all", "-fsanitize=address,undefined",
        # What AddressSanitizer finds as well, at half of the time it takes to compile.
        "-fno-sanitize=null,object-size,pointer-overflow",
        "-Wl,--unresolved-symbols=ignore-all", str(program), *map(str, used), "-o", str(built),
    ]  # fmt: skip
    if Path(compiler).name == "g++":  # a call for each check: the code of all takes long to compile
        command += ["--param", "asan-instrumentation-with-call-threshold=0"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode and "cannot find" in compiled.stderr:
        pytest.skip(f"the compiler has no sanitizer: {compiled.stderr.splitlines()[-1]}")
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([built], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == "done\n"
