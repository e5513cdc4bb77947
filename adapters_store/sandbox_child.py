"""The processes of the checks: one reads jobs and forks for each; its child limits itself, answers
and ends."""

from __future__ import annotations

import os
import resource
import signal
import sys
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
# alone does not give it. Where they have nothing left for so long, it begins again with a share.
_IDLE_SECONDS = 5.0
_NICER = 10


def main() -> None:
    """Answer the jobs on standard input, one a line, on standard output."""
    torch.set_num_threads(1)  # a fork has no threads but its own
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(_checked(Job.model_validate_json(line)) + b"\n")
        sys.stdout.buffer.flush()


def _checked(job: Job) -> bytes:
    """The answer to a job, within its seconds; nothing if a process broke."""
    if not hasattr(os, "SCHED_IDLE"):  # another system than Linux
        return _forked(job, idle=False)
    idle_seconds = min(_IDLE_SECONDS, job.seconds / 2)
    said = _forked(job.model_copy(update={"seconds": idle_seconds}), idle=True)
    if said != LATE:
        return said
    rest = {"seconds": job.seconds - idle_seconds}
    return _forked(job.model_copy(update=rest), idle=False)


def _forked(job: Job, *, idle: bool) -> bytes:
    """The answer of a process of its own; nothing if it broke."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer_and_end(job, writing, idle=idle)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read(LONGEST_ANSWER)
    _, status = os.waitpid(child, 0)
    late = (signal.SIGALRM, signal.SIGXCPU)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in late:
        return LATE
    # A line is one answer, whatever a broken process wrote.
    return b"" if b"\n" in said else said


def _answer_and_end(job: Job, writing: int, *, idle: bool) -> None:
    try:
        if idle:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.nice(_NICER)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):  # the server's
            os.dup2(nothing, stream)
        os.write(writing, _answer(job).model_dump_json().encode())
    finally:
        os._exit(0)  # nothing is left to be tidied up, and torch would take its time


def _answer(job: Job) -> Answer:
    try:
        _limit(job)
        return Answer(
            checked=check_upload(job.config_path, job.tensor_path, job.manifest, job.upload)
        )
    except RejectedError as error:
        return Answer(rejected=str(error))
    except MemoryError:
        return Answer(rejected="checking it takes more memory than an adapter may")
    except Exception as error:  # whatever a stranger's file could make a library raise
        return Answer(rejected=f"it could not be read ({type(error).__name__})")


def _limit(job: Job) -> None:
    size = job.tensor_path.stat().st_size
    memory = _mapped_now() + job.memory_bytes + _MAPPINGS * min(size, job.upload.tensor_bytes)
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(job.seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    signal.setitimer(signal.ITIMER_REAL, job.seconds)


def _mapped_now() -> int:
    """Bytes of address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
