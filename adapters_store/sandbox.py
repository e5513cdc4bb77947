"""The validator in a process of its own, under limits of memory and time.

Whatever an upload does to the process that reads it, the one that asked gets an answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spallm_serve.adapters_store.failures import RejectedError, UnavailableError
from spallm_serve.adapters_store.manifest import BaseManifest
from spallm_serve.adapters_store.validate import Checked, UploadLimits

_CHILD = "spallm_serve.adapters_store.sandbox_child"
LONGEST_ANSWER = 4 << 20
LATE = b"late"
# Beyond a check's own seconds: the process may have to import torch first.
_GRACE_SECONDS = 60.0
# Nothing of the server's environment is a stranger's business: its secrets are there.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PATH": os.defpath}


class SandboxLimits(BaseModel):
    """What one check may use.

    Attributes:
        memory_bytes: beyond the tensors' own size, which is mapped.
        seconds: from the question to the answer.
        parallel: checks at the same time; more wait.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_bytes: int = Field(default=1 << 30, ge=1 << 20)
    seconds: float = Field(default=60, gt=0)
    parallel: int = Field(default=2, ge=1)


class Job(BaseModel):
    """What the process is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config_path: Path
    tensor_path: Path
    manifest: BaseManifest
    upload: UploadLimits
    memory_bytes: int
    seconds: float


class Answer(BaseModel):
    """What it says: one of the two."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checked: Checked | None = None
    rejected: str | None = None


class Sandbox:
    """Checks uploads, each in a new process; threads may share it.

    Such a process is forked from one that has imported all it needs, and which ends by itself when
    this one does: starting one anew would take the engine's processors for seconds.

    Args:
        manifest: of the base that adapters must fit.
        upload: limits on uploads.
        limits: on the process.
    """

    def __init__(
        self,
        manifest: BaseManifest,
        upload: UploadLimits | None = None,
        limits: SandboxLimits | None = None,
    ) -> None:
        self.manifest = manifest
        self.upload = UploadLimits() if upload is None else upload
        self._limits = SandboxLimits() if limits is None else limits
        self._turns = threading.BoundedSemaphore(self._limits.parallel)
        self._lock = threading.Lock()
        self._waiting: list[subprocess.Popen[bytes]] = []

    def warm_up(self) -> None:
        """Start a process, unless one waits already."""
        with self._lock:
            if not self._waiting:
                self._waiting.append(_start())

    def check(self, config_path: Path, tensor_path: Path) -> Checked:
        """Check an upload (:func:`spallm_serve.adapters_store.validate.check_upload`).

        Raises:
            RejectedError: it is no adapter of the base, or could not be checked within the limits.
            UnavailableError: no process could be started.
        """
        with self._turns:
            process = self._take()
            try:
                answer = self._ask(process, config_path.absolute(), tensor_path.absolute())
            except BaseException:
                _end(process)
                raise
            with self._lock:
                self._waiting.append(process)
        if answer.checked is None:
            raise RejectedError(answer.rejected or "it could not be checked")
        return answer.checked

    def close(self) -> None:
        """End the processes that wait."""
        with self._lock:
            for process in self._waiting:
                _end(process)
            self._waiting.clear()

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            while self._waiting:
                process = self._waiting.pop()
                if process.poll() is None:
                    return process
                _end(process)
        return _start()

    def _ask(
        self, process: subprocess.Popen[bytes], config_path: Path, tensor_path: Path
    ) -> Answer:
        job = Job(
            config_path=config_path,
            tensor_path=tensor_path,
            manifest=self.manifest,
            upload=self.upload,
            memory_bytes=self._limits.memory_bytes,
            seconds=self._limits.seconds,
        )
        # The forked process ends itself in time; this is for one that does not.
        timer = threading.Timer(self._limits.seconds + _GRACE_SECONDS, process.kill)
        timer.start()
        try:
            _pipe(process.stdin).write(job.model_dump_json().encode() + b"\n")
            _pipe(process.stdin).flush()
            said = _pipe(process.stdout).readline(LONGEST_ANSWER + 1)
        except OSError:  # it is gone
            said = b""
        finally:
            timer.cancel()
        if said.strip() == LATE:
            return Answer(rejected=f"checking it took longer than {self._limits.seconds:g} seconds")
        try:
            return Answer.model_validate_json(said)
        except ValidationError:
            # Whatever it may have left behind in its pipe is not the next one's answer.
            process.kill()
            return Answer(
                rejected="checking it broke the process that did so; is it larger or stranger than "
                "an adapter is?"
            )


def _start() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-m", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            cwd="/",
        )
    except OSError as error:
        raise UnavailableError(f"no process to check an upload can be started ({error})") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            _pipe(pipe).close()
        except OSError:  # what was not written yet has nobody to read it
            continue


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # both were asked for
    return pipe
