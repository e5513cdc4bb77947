"""Peak memory of compressing a model of 1.1 B parameters, and that it does not grow with depth."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from spallm_serve.benchmarks.model import write_random_llama
from spallm_serve.benchmarks.records import Record

_MIB = 1 << 20
_ALLOWANCE = 700_000_000
_SAMPLES, _SEQLEN = 4, 512


def memory_records(scratch: Path, depths: tuple[int, ...], bits: int) -> Iterator[Record]:
    """Compress random Llamas of several depths, each in a process of its own.

    The bound is what the product promises: the embeddings, two blocks and the calibration
    activations, all in bfloat16 as the model is, and 700 MB. The calibration tokens are random too.

    Args:
        scratch: for the models and their compressed forms.
        depths: numbers of blocks; 22 make 1.1 B parameters.
        bits: to compress to.
    """
    for blocks in depths:
        source = scratch / f"llama-{blocks}"
        if not source.exists():
            write_random_llama(source, blocks)
        peak = _peak_rss(source, scratch / f"llama-{blocks}-out", bits)
        embeddings = 2 * 32000 * 2048 * 2
        block = 2 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 5632 * 2048)
        activations = 2 * _SAMPLES * _SEQLEN * 2048
        bound = embeddings + 2 * block + activations + _ALLOWANCE
        parameters = (blocks * block + embeddings) // 2
        yield Record(
            bench="memory",
            case={
                "blocks": blocks,
                "parameters": parameters,
                "bits": bits,
                "bound_mib": bound // _MIB,
                "within_bound": peak <= bound,
            },
            metric="peak_rss_mib",
            ours=round(peak / _MIB, 1),
        )


def _peak_rss(source: Path, output: Path, bits: int) -> int:
    """Largest resident set, in bytes, of compressing in a fresh process; file pages included."""
    program = (
        "import sys, torch; from pathlib import Path;"
        "from spallm_serve.benchmarks.memory import compress_on_random_tokens as run;"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))"
    )
    command = [sys.executable, "-c", program, str(source), str(output), str(bits)]
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"compressing {source.name} failed with code {child.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compress_on_random_tokens(source: Path, output: Path, bits: int) -> None:
    """Compress a model without a tokenizer: its calibration tokens are put in place first."""
    import torch

    from spallm_serve.compressor.observer import SilentObserver
    from spallm_serve.compressor.pipeline import TOKENS_FILE, compress
    from spallm_serve.compressor.run_directory import RunDirectory, fingerprint
    from spallm_serve.compressor.settings import CompressSettings

    settings = CompressSettings.model_validate(
        {"bits": bits, "samples": _SAMPLES, "seqlen": _SEQLEN}
    )
    run = RunDirectory(output)
    run.path.mkdir(parents=True)
    run.claim(fingerprint(settings, source))
    tokens = torch.randint(3, 32000, (_SAMPLES, _SEQLEN), generator=torch.manual_seed(0))
    run.save(TOKENS_FILE, {"tokens": tokens})
    compress(str(source), output, settings, SilentObserver())
