"""Bytes of a model's weights, from the headers of its checkpoint."""

from __future__ import annotations

from pathlib import Path

from spallm_serve.benchmarks.records import Record
from spallm_serve.shards import ShardReader

# SparseLoRA's, for training only.
_ESTIMATOR = ".estimator"


def weights_bytes(directory: Path) -> int:
    """Of all parameters, codes and tables that a server has to hold.

    Args:
        directory: of a checkpoint, compressed or not.
    """
    shards = ShardReader(directory)
    return sum(shards.nbytes(name) for name in shards if _ESTIMATOR not in name)


def weights_record(model: Path, base: Path) -> Record:
    """A compressed base's bytes beside its original's.

    Args:
        model: the original.
        base: what was made of it.
    """
    ours, theirs = weights_bytes(base), weights_bytes(model)
    return Record(
        bench="serve",
        case={"model": model.name, "base": base.name},
        metric="weights_bytes",
        ours=ours,
        peer=theirs,
        peer_name="the original's parameters",
        ratio=round(theirs / ours, 3),
    )
