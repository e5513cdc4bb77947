"""The process of one check: reads a job, limits itself, answers, ends."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from spallm_serve.adapters_store.failures import RejectedError
from spallm_serve.adapters_store.sandbox import Answer, Job
from spallm_serve.adapters_store.validate import check_upload

# A file's bytes are mapped twice: by safetensors for its header, by torch for the tensors.
_MAPPINGS = 2
_OPEN_FILES = 32


def main() -> None:
    """Answer the job on standard input, on standard output."""
    torch.set_num_threads(1)
    text = sys.stdin.buffer.read()
    if not text:
        return  # the store is gone
    answer = _answer(Job.model_validate_json(text))
    sys.stdout.buffer.write(answer.model_dump_json().encode())
    sys.stdout.buffer.flush()
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
    used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 1
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, used + job.cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def _mapped_now() -> int:
    """Bytes of address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
