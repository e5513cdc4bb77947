"""Peer: rounding to the nearest level of an asymmetric min-max grid, without calibration.

The plainest way to quantize and so the floor of any comparison. Each group of consecutive inputs of
a row holds a float16 scale and a zero point as wide as its codes:
``weight = scale * (code - zero)``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .interface import PeerResult
from .support import Measured, bits_and_group, block_linears, load_model, replace_weight

SETTINGS: tuple[str, ...] = ("4bit-g64", "4bit-row", "3bit-g64", "2bit-g64")

_SCALE_BITS = 16


def _round_group(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Decode of the codes nearest to ``weight`` float32 ``[rows, group]``, one grid a row."""
    levels = 2**bits - 1
    # The grid takes in zero, so that the zero point is itself a code and fits in ``bits`` bits.
    low = weight.amin(1, keepdim=True).clamp(max=0.0)
    high = weight.amax(1, keepdim=True).clamp(min=0.0)
    scale = ((high - low) / levels).half().float()
    # A group of zeros (or one below float16's smallest step) has no scale; any will do for zeros.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp(0, levels)
    codes = (weight / scale + zero).round().clamp(0, levels)
    return scale * (codes - zero)


def compress(model_dir: Path, calibration: torch.Tensor, setting: str, scratch: Path) -> PeerResult:
    """Compress by rounding to nearest; see :class:`.interface.Compress`.

    Settings are ``<bits>bit-g<group>`` and ``<bits>bit-row`` (one group a row). A row's last group
    is shorter where the group size does not divide the row.
    """
    bits, group = bits_and_group(setting)
    model = load_model(model_dir)
    stored = weights = 0
    with Measured() as measured, torch.inference_mode():
        for _, linear in block_linears(model):
            parts = torch.split(linear.weight, group or linear.in_features, dim=1)
            replace_weight(linear, torch.cat([_round_group(part, bits) for part in parts], 1))
            weights += linear.weight.numel()
            stored += linear.weight.numel() * bits
            stored += linear.out_features * len(parts) * (_SCALE_BITS + bits)
    return PeerResult(
        "round to nearest",
        setting,
        stored / weights,
        measured.seconds,
        model,
        measured.peak_rss_bytes,
    )
