"""``kill -9`` at random moments: what comes out must be the same to the byte."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spallm_serve.benchmarks.records import Record

# Beside an adapter; says how fast it was made.
_ABOUT_THE_RUN = "training.json"
# In an output until all is done.
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Killable:
    """A command that goes on where it was killed.

    Attributes:
        name: what is shown.
        module: whose ``app`` is the command.
        arguments: all but the output.
        last: the file that is written last into the output.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    last: str

    def is_finished(self, output: Path) -> bool:
        """Whether a run came to its end."""
        return (output / self.last).is_file() and not (output / _UNFINISHED).exists()

    def run(self, output: Path, kill_after: float | None) -> bool:
        """Run it; True if it was killed, False if it finished first.

        Args:
            output: the directory it makes.
            kill_after: seconds; None leaves it alone.

        Raises:
            RuntimeError: it failed.
        """
        program = f"from {self.module} import app; app()"
        command = [sys.executable, "-c", program, *self.arguments, "-o", str(output)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, errors = child.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
            return True
        if child.returncode:
            raise RuntimeError(f"{self.name} failed: {errors.decode(errors='replace')}")
        return False


def compressing(model_dir: Path, options: list[str]) -> Killable:
    """``spallm-compress``."""
    arguments = (str(model_dir), *options)
    module = "spallm_serve.compressor.cli"
    return Killable("spallm-compress", module, arguments, "config.json")


def training(base: Path, data: Path, options: list[str]) -> Killable:
    """``spallm-train``."""
    arguments = (str(base), "--data", str(data), *options)
    module = "spallm_serve.trainer.cli"
    return Killable("spallm-train", module, arguments, "adapter_config.json")


def resume_records(command: Killable, scratch: Path, kills: int, seed: int) -> list[Record]:
    """Run once undisturbed; then again, killed at random moments and started anew each time.

    Args:
        command: what to run.
        scratch: for the two outputs.
        kills: how often; each comes after a random 3 to 20 % of the undisturbed run's duration, so
            that ten of them still fall inside the run.
        seed: of the moments.

    Raises:
        RuntimeError: a run that was left alone failed.
    """
    started = time.perf_counter()
    command.run(scratch / "undisturbed", None)
    duration = time.perf_counter() - started
    moments = random.Random(seed)
    finished_early = 0
    killed = scratch / "killed"
    for _ in range(kills):
        if not command.run(killed, moments.uniform(0.03, 0.2) * duration):
            finished_early += 1
            break
    if not command.is_finished(killed):
        command.run(killed, None)
    same = directory_digest(scratch / "undisturbed") == directory_digest(killed)
    case: dict[str, Any] = {
        "command": command.name,
        "kills": kills - finished_early,
        "seconds_undisturbed": round(duration, 1),
    }
    return [
        Record(
            bench="resume",
            case=case,
            metric="byte_identical",
            ours=float(same),
            better="higher",
            runs=kills,
        )
    ]


def directory_digest(directory: Path) -> str:
    """sha256 over the names and bytes of all files below a directory but a run's own record."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != _ABOUT_THE_RUN:
            digest.update(f"{path.relative_to(directory)}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
