"""Peak memory of compressing a model of 1.1 B parameters, and that it does not grow with depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spallm_serve.benchmarks.model import write_random_llama
from spallm_serve.benchmarks.peak_memory import peak_rss
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
        output = scratch / f"llama-{blocks}-out"
        peak = peak_rss(
            compress_on_random_tokens, source=str(source), output=str(output), bits=bits
        )
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


def compress_on_random_tokens(source: str, output: str, bits: int) -> None:
    """Compress a model without a tokenizer: its calibration tokens are put in place first."""
    import torch

    from spallm_serve.compressor.observer import SilentObserver
    from spallm_serve.compressor.pipeline import TOKENS_FILE, compress
    from spallm_serve.compressor.run_directory import RunDirectory, fingerprint
    from spallm_serve.compressor.settings import CompressSettings

    settings = CompressSettings.model_validate(
        {"bits": bits, "samples": _SAMPLES, "seqlen": _SEQLEN}
    )
    run = RunDirectory(Path(output))
    run.path.mkdir(parents=True)
    run.claim(fingerprint(settings, Path(source)))
    tokens = torch.randint(3, 32000, (_SAMPLES, _SEQLEN), generator=torch.manual_seed(0))
    run.save(TOKENS_FILE, {"tokens": tokens})
    compress(source, Path(output), settings, SilentObserver())
