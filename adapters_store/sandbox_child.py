"""The processes of the checks: one reads jobs and forks for each; its child limits itself, answers
and ends."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

import torch

from spallm_serve.adapters_store.failures import RejectedError
from spallm_serve.adapters_store.sandbox import LATE, LONGEST_ANSWER, Answer, Job
from spallm_serve.adapters_store.validate import check_upload

# A file's bytes are mapped twice: by safetensors for its header, by torch for the tensors.
_MAPPINGS = 2
_OPEN_FILES = 32
# Nobody waits for an upload as they do for a token. First a check has what the processors have
# left, and a thread of the engine takes its processor back as soon as it wants it, which niceness
# alone does not give it. A check that has not ended by then begins again with a small share.
_IDLE_SECONDS = 5.0
_NICER = 10
_GRACE_SECONDS = 1.0


def main() -> None:
    """Answer the jobs on standard input, one a line, on standard output."""
    torch.set_num_threads(1)  # a fork has no threads but its own
    for line in sys.stdin.buffer:
        _bury()
        sys.stdout.buffer.write(_checked(Job.model_validate_json(line)) + b"\n")
        sys.stdout.buffer.flush()


def _bury() -> None:
    """Forget children that have ended.

    None is waited for when it has answered or is killed: one that has nothing of the processors
    needs them to end, too.
    """
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _checked(job: Job) -> bytes:
    """The answer to a job, within its seconds; nothing if a process broke."""
    ends = time.monotonic() + job.seconds
    said = _forked(job, min(_IDLE_SECONDS, job.seconds / 2), idle=True)
    left = ends - time.monotonic()
    return _forked(job, left, idle=False) if said == LATE and left > 0 else said


def _forked(job: Job, seconds: float, *, idle: bool) -> bytes:
    """The answer of a process of its own; nothing if it broke."""
    ends = time.monotonic() + seconds
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer_and_end(job, seconds, writing, idle=idle)
    os.close(writing)
    said = b""
    try:
        while len(said) < LONGEST_ANSWER:
            ready, _, _ = select.select([reading], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                return LATE
            part = os.read(reading, LONGEST_ANSWER - len(said))
            if not part:
                break
            said += part
    finally:
        os.close(reading)
    # A line is one answer, whatever a broken process wrote.
    return b"" if b"\n" in said else said


def _answer_and_end(job: Job, seconds: float, writing: int, *, idle: bool) -> None:
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):  # the server's
            os.dup2(nothing, stream)
        os.write(writing, _answer(job, seconds, idle=idle).model_dump_json().encode())
        os.close(writing)  # before the rest of it goes, which takes a while
    finally:
        os._exit(0)  # nothing is left to be tidied up, and torch would take its time


def _answer(job: Job, seconds: float, *, idle: bool) -> Answer:
    try:
        _limit(job, seconds)
        _step_back(idle=idle)
        return Answer(
            checked=check_upload(job.config_path, job.tensor_path, job.manifest, job.upload)
        )
    except RejectedError as error:
        return Answer(rejected=str(error))
    except MemoryError:
        return Answer(rejected="checking it takes more memory than an adapter may")
    except Exception as error:  # whatever a stranger's file could make a library raise
        return Answer(rejected=f"it could not be read ({type(error).__name__})")


def _step_back(*, idle: bool) -> None:
    if idle:
        with contextlib.suppress(OSError):  # a container may not let it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            return
    os.nice(_NICER)


def _limit(job: Job, seconds: float) -> None:
    size = job.tensor_path.stat().st_size
    memory = _mapped_now() + job.memory_bytes + _MAPPINGS * min(size, job.upload.tensor_bytes)
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    # Where the one that asked is gone and kills nobody.
    signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)


def _mapped_now() -> int:
    """Bytes of address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
