"""Peer: a k-means table per row, every weight counting the same, without calibration.

What a lookup table gives before anything is known of the activations: each row's weights are
clustered, the centres are the row's table (float16), and each weight takes the nearest entry. The
clusters are the best there are, not a local optimum: in one dimension the package kmeans1d finds
them exactly. (Lloyd's iteration from one start was seen to end at twice the squared error.)
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .interface import PeerResult
from .support import Measured, block_linears, load_model, replace_weight, require

SETTINGS: tuple[str, ...] = ("4bit", "3bit", "2bit")

_ENTRY_BITS = 16


def _nearest(values: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry: values ``[rows, n]``, ascending tables ``[rows, k]``."""
    midpoints = (tables[:, 1:] + tables[:, :-1]) / 2
    return torch.searchsorted(midpoints.contiguous(), values.contiguous())


def _tables(weight: torch.Tensor, entries: int, pool: ThreadPoolExecutor) -> torch.Tensor:
    """Ascending tables ``[out, entries]`` for a weight ``[out, in]``, float16 values in float32."""
    kmeans1d = require("kmeans1d", "kmeans1d")

    def centres(row: list[float]) -> list[float]:
        found: list[float] = kmeans1d.cluster(row, entries).centroids
        return found + found[-1:] * (entries - len(found))  # a row may be shorter than its table

    # Threads do: the package leaves Python's lock while it works.
    return torch.tensor(list(pool.map(centres, weight.tolist()))).half().float()


def compress(model_dir: Path, calibration: torch.Tensor, setting: str, scratch: Path) -> PeerResult:
    """Compress to unweighted k-means tables; see :class:`.interface.Compress`.

    Settings are ``<bits>bit``: tables of ``2**bits`` entries.
    """
    match = re.fullmatch(r"([1-8])bit", setting)
    if match is None:
        raise ValueError(f"unknown setting {setting!r}: expected e.g. '4bit'")
    bits = int(match[1])
    model = load_model(model_dir)
    stored = weights = 0
    with (
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
        Measured() as measured,
        torch.inference_mode(),
    ):
        for _, linear in block_linears(model):
            table = _tables(linear.weight, 2**bits, pool)
            replace_weight(linear, table.gather(1, _nearest(linear.weight, table)))
            weights += linear.weight.numel()
            stored += linear.weight.numel() * bits + table.numel() * _ENTRY_BITS
    return PeerResult(
        "k-means, unweighted",
        setting,
        stored / weights,
        measured.seconds,
        model,
        measured.peak_rss_bytes,
    )
