"""``kill -9`` at random moments: the finished directory must be the same to the byte."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from spallm_serve.benchmarks.records import Record


def resume_records(
    model_dir: Path, scratch: Path, arguments: list[str], kills: int, seed: int
) -> list[Record]:
    """Compress once undisturbed; then again, killed at random moments and started anew each time.

    Args:
        model_dir: what to compress.
        scratch: for the two outputs.
        arguments: further options of ``spallm-compress``.
        kills: how often; each comes after a random 3 to 20 % of the undisturbed run's duration, so
            that ten of them still fall inside the run.
        seed: of the moments.

    Raises:
        RuntimeError: a run that was left alone failed.
    """
    started = time.perf_counter()
    _run(model_dir, scratch / "undisturbed", arguments, None)
    duration = time.perf_counter() - started
    moments = random.Random(seed)
    finished_early = 0
    killed = scratch / "killed"
    for _ in range(kills):
        if not _run(model_dir, killed, arguments, moments.uniform(0.03, 0.2) * duration):
            finished_early += 1
            break
    if not (killed / "config.json").is_file() or (killed / ".unfinished").exists():
        _run(model_dir, killed, arguments, None)
    same = directory_digest(scratch / "undisturbed") == directory_digest(killed)
    return [
        Record(
            bench="resume",
            case={"kills": kills - finished_early, "seconds_undisturbed": round(duration, 1)},
            metric="byte_identical",
            ours=float(same),
            better="higher",
            runs=kills,
        )
    ]


def directory_digest(directory: Path) -> str:
    """sha256 over the names and bytes of all files below a directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(directory)}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _run(model_dir: Path, output: Path, arguments: list[str], kill_after: float | None) -> bool:
    """Run the command; True if it was killed, False if it finished first."""
    program = "from spallm_serve.compressor.cli import app; app()"
    command = [sys.executable, "-c", program, str(model_dir), "-o", str(output), *arguments]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = child.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        return True
    if child.returncode:
        raise RuntimeError(f"spallm-compress failed: {errors.decode(errors='replace')}")
    return False
