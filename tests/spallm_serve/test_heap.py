"""What is said of the memory a run took."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spallm_serve.heap import peak_resident_bytes

MIB = 1 << 20


def test_peak_is_what_was_held_and_given_back() -> None:
    before = peak_resident_bytes()
    del_me = bytearray(b"x") * (before + 64 * MIB)
    del del_me
    assert peak_resident_bytes() >= before + 64 * MIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it apart")
def test_a_parents_memory_is_not_counted() -> None:
    held = bytearray(b"x") * (400 * MIB)
    program = "from spallm_serve.heap import peak_resident_bytes;print(peak_resident_bytes())"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < len(held)
