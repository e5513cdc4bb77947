"""Peer: the NF4 format of bitsandbytes, without calibration.

Blocks of 64 weights share a float32 scale (their largest magnitude) and take codes of a fixed
16-entry table. With double quantization the scales are themselves stored in 8 bits, 256 to a
float32 scale, around one float32 offset a layer. The two fixed tables (of weights and of scales)
belong to the format and count no bits.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .interface import PeerResult
from .support import Measured, block_linears, load_model, replace_weight, require

SETTINGS: tuple[str, ...] = ("block64", "block64-double")

_BLOCK = 64
_CODE_BITS = 4


def compress(model_dir: Path, calibration: torch.Tensor, setting: str, scratch: Path) -> PeerResult:
    """Compress to NF4 and back; see :class:`.interface.Compress`.

    Settings: ``block64`` with float32 scales, ``block64-double`` with double quantization.
    """
    if setting not in SETTINGS:
        raise ValueError(f"unknown setting {setting!r}: expected one of {SETTINGS}")
    functional = require("bitsandbytes.functional", "bitsandbytes")
    model = load_model(model_dir)
    stored = weights = 0
    with Measured() as measured, torch.inference_mode():
        for _, linear in block_linears(model):
            codes, state = functional.quantize_4bit(
                linear.weight,
                blocksize=_BLOCK,
                compress_statistics=setting == "block64-double",
                quant_type="nf4",
            )
            replace_weight(linear, functional.dequantize_4bit(codes, state))
            weights += linear.weight.numel()
            stored += linear.weight.numel() * _CODE_BITS
            scales = [state.absmax]
            if state.nested:
                scales += [state.state2.absmax, state.offset]
            stored += sum(part.numel() * part.element_size() * 8 for part in scales)
    return PeerResult(
        "bitsandbytes NF4",
        setting,
        stored / weights,
        measured.seconds,
        model,
        measured.peak_rss_bytes,
    )
