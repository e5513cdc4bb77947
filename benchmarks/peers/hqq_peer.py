"""Peer: half-quadratic quantization by the package hqq, without calibration.

Groups of consecutive weights share a float16 scale and a float16 zero point, which hqq fits to the
weights alone by minimising a norm that forgives outliers.

Codes count at their nominal width. hqq itself keeps ten 3-bit codes in 32 bits (3.2 bits each), but
that is its kernels' layout rather than the method's cost.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .interface import PeerResult
from .support import Measured, bits_and_group, block_linears, load_model, replace_weight, require

SETTINGS: tuple[str, ...] = ("4bit-g64", "4bit-g128", "2bit-g16", "3bit-g64")


def compress(model_dir: Path, calibration: torch.Tensor, setting: str, scratch: Path) -> PeerResult:
    """Compress with hqq; see :class:`.interface.Compress`.

    Settings are ``<bits>bit-g<group>``; everything else is as hqq's ``BaseQuantizeConfig`` has it.
    """
    bits, group = bits_and_group(setting)
    if group is None:
        raise ValueError(f"setting {setting!r}: this peer works in groups, e.g. '4bit-g64'")
    hqq = require("hqq.core.quantize", "hqq")
    options = hqq.BaseQuantizeConfig(nbits=bits, group_size=group)["weight_quant_params"]
    model = load_model(model_dir)
    stored = weights = 0
    with Measured() as measured, torch.inference_mode():
        for _, linear in block_linears(model):
            # Unpacked: hqq's bit packing is lossless, and the codes' width is known.
            codes, meta = hqq.Quantizer.quantize(
                linear.weight, **options, bitpack=False, device="cpu", compute_dtype=torch.float32
            )
            for part in ("scale", "zero"):
                meta[part] = meta[part].half().float()  # what hqq would store
                stored += meta[part].numel() * 16
            meta["compute_dtype"] = torch.float32
            replace_weight(linear, hqq.Quantizer.dequantize(codes, meta))
            weights += linear.weight.numel()
            stored += linear.weight.numel() * bits
    return PeerResult(
        "HQQ",
        setting,
        stored / weights,
        measured.seconds,
        model,
        measured.peak_rss_bytes,
    )
