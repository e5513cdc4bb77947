"""What the blocks compute in while calibration tokens pass them."""

from __future__ import annotations

import torch

from spallm_serve.precision import bfloat16_is_native
from spallm_serve.shards import ShardReader


def compute_dtype(reader: ShardReader, device: torch.device) -> torch.dtype:
    """bfloat16 for a model stored in it, where the device multiplies it natively; else float32.

    A model stored in bfloat16 also runs in it, and the rounding is far below that of the codes.
    Where the processor would only emulate it, float32 is faster. Hessians are float32 in any case.
    """
    stored_in_bfloat16 = reader.dominant_dtype() == "BF16"
    return torch.bfloat16 if stored_in_bfloat16 and bfloat16_is_native(device) else torch.float32
