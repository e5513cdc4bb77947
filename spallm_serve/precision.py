"""What a device multiplies natively."""

from __future__ import annotations

import torch


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 as such; where it is emulated, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(
        capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )  # the last: Arm
