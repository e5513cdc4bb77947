"""Peak memory of training on a random Llama, each method in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spallm_serve.benchmarks.memory import compress_on_random_tokens
from spallm_serve.benchmarks.model import write_random_llama
from spallm_serve.benchmarks.peak_memory import peak_rss
from spallm_serve.benchmarks.records import Record
from spallm_serve.benchmarks.training import PEER, Variant
from spallm_serve.heap import return_large_blocks_at_once

_MIB = 1 << 20
_STEPS = 3
# Of the tokens, as on BoolQ; their logits are not computed.
_CONTEXT = 0.85


def training_memory_records(
    variants: list[Variant], scratch: Path, blocks: int, rows: int, length: int
) -> Iterator[Record]:
    """Three steps of every variant and of PEFT's LoRA on the dense base, same batches and head.

    Args:
        variants: what to measure.
        scratch: for the model and its compressed forms; what is there is used.
        blocks: of the model; 22 make 1.1 B parameters.
        rows, length: of a batch of random tokens, 85 % of them context.
    """
    dense = scratch / f"llama-{blocks}"
    if not dense.exists():
        write_random_llama(dense, blocks)
    shared = {"rows": rows, "length": length}
    libraries = peak_rss(load_libraries)
    peer = _measure(Variant(PEER, PEER, None, {}), dense, shared, stock=True)
    for variant in variants:
        base = dense
        if variant.bits is not None:
            base = scratch / f"llama-{blocks}-{variant.bits}bit"
            if not (base / "config.json").is_file():
                compress_on_random_tokens(str(dense), str(base), variant.bits)
        ours = _measure(variant, base, shared, stock=False)
        yield Record(
            bench="training-memory",
            case={
                "variant": variant.name,
                "blocks": blocks,
                "rows": rows,
                "tokens_in_a_row": length,
                "libraries_mib": round(libraries / _MIB, 1),
            },
            metric="peak_rss_mib",
            ours=round(ours / _MIB, 1),
            peer=round(peer / _MIB, 1),
            peer_name="PEFT LoRA, rank 16, on the bfloat16 base",
            ratio=round(peer / ours, 3),
        )


def load_libraries() -> None:
    """What every process that trains has in memory beside the model."""
    import torch

    from spallm_serve.trainer import run  # noqa: F401

    torch.zeros(1)


def _measure(variant: Variant, base: Path, shared: dict[str, int], *, stock: bool) -> int:
    return peak_rss(
        train_on_random_tokens,
        base=str(base),
        method=variant.method,
        settings=variant.settings,
        stock=stock,
        **shared,
    )


def train_on_random_tokens(
    base: str, method: str, settings: dict[str, Any], rows: int, length: int, *, stock: bool
) -> None:
    """A few steps of a method on a base, activations in bfloat16.

    Freed activations go back to the system for the peer too, which PEFT would not do.

    Args:
        base: a model directory.
        method: a key of ``tuning.METHODS``.
        settings: the trainer's.
        rows, length: of a batch.
        stock: see :func:`~spallm_serve.benchmarks.training.prepare`.
    """
    import torch

    from spallm_serve.benchmarks.training import prepare

    return_large_blocks_at_once()
    torch.set_float32_matmul_precision("medium")
    ids = torch.randint(3, 32000, (rows, length), generator=torch.manual_seed(0))
    labels = ids.clone()
    labels[:, : int(_CONTEXT * length)] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    prepared = prepare(Path(base), method, settings, [batch], torch.bfloat16, stock=stock)
    for _ in range(_STEPS):
        prepared.step()
