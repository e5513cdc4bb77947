"""Peer: GPTQ by the package gptqmodel, with calibration.

Groups of inputs share a float16 scale and a zero point as wide as the codes; rounding errors are
fed back into the weights not yet rounded, by the second moments of the layer's inputs. Everything
not in the setting is as gptqmodel's ``QuantizeConfig`` has it, its group-aware reordering of inputs
in place of ``desc_act`` among them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .interface import PeerResult
from .support import Measured, block_linears, load_model, replace_weight, require

SETTINGS: tuple[str, ...] = ("4bit-g64", "3bit-g64", "2bit-g64")


def _stored_bits(layer: nn.Module, group: int) -> int:
    """Bits of a packed layer as gptqmodel would write it.

    The group index of the inputs counts where it says more than that groups follow one another.
    """
    packed = layer.state_dict()
    index = packed["g_idx"]
    counted = [packed["qweight"], packed["qzeros"], packed["scales"]]
    if not torch.equal(index.long(), torch.arange(index.numel()) // group):
        counted.append(index)
    return sum(part.numel() * part.element_size() * 8 for part in counted)


def _quantize(
    model_dir: Path, windows: torch.Tensor, options: dict[str, Any]
) -> tuple[nn.Module, Measured]:
    """Load, quantize and pack in gptqmodel; the packed model and what it took."""
    if (os.cpu_count() or 1) <= 2:
        # The package would start one worker here, fewer than its own loader asks for, and then
        # refuse to load any model. It reads this variable once, at first use.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    gptqmodel = require("gptqmodel", "gptqmodel")
    # The first version of the format stores zero points less one, which asymmetric ones can
    # underflow and the layers' own decoding does not undo; the second stores them as they are.
    config = gptqmodel.QuantizeConfig(
        **options, format="gptq_v2", device="cpu", offload_to_disk=False
    )
    packed = gptqmodel.GPTQModel.load(str(model_dir), config, dtype=torch.float32)
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows.tolist()]
    with Measured() as measured:
        packed.quantize(samples, batch_size=1, backend=gptqmodel.BACKEND.TORCH)
    return packed.model, measured


def compress(model_dir: Path, calibration: torch.Tensor, setting: str, scratch: Path) -> PeerResult:
    """Compress with GPTQ; see :class:`.interface.Compress`.

    Settings are ``<bits>bit-g<group>``, symmetric about zero as by default, with ``-asym`` for
    zero points of their own.
    """
    match = re.fullmatch(r"([2348])bit-g(\d+)(-asym)?", setting)
    if match is None:
        raise ValueError(f"unknown setting {setting!r}: expected e.g. '4bit-g64'")
    bits, group, symmetric = int(match[1]), int(match[2]), match[3] is None
    packed, measured = _quantize(
        model_dir, calibration, {"bits": bits, "group_size": group, "sym": symmetric}
    )
    model = load_model(model_dir)
    stored = weights = 0
    for name, linear in block_linears(model):
        layer: Any = packed.get_submodule(name)
        if not hasattr(layer, "dequantize_weight"):
            raise ValueError(f"gptqmodel left {name!r} unquantized")
        replace_weight(linear, layer.dequantize_weight().T)
        stored += _stored_bits(layer, group)
        weights += linear.weight.numel()
    return PeerResult(
        "GPTQModel",
        setting,
        stored / weights,
        measured.seconds,
        model,
        measured.peak_rss_bytes,
    )
