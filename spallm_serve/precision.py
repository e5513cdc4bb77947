"""What a device multiplies natively, and which values are numbers."""

from __future__ import annotations

import torch
from torch import Tensor

# As integers of the same size: all bits but the sign, and the exponent of what is no number.
_INTEGERS = {
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}


def all_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite.

    By integers, where torch's own ``isfinite`` takes several times as long for half precision.
    """
    if tensor.dtype not in _INTEGERS or tensor.numel() == 0:
        return bool(torch.isfinite(tensor).all())
    integer, magnitude, infinite = _INTEGERS[tensor.dtype]
    return int(tensor.view(integer).bitwise_and(magnitude).amax()) < infinite


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 as such; where it is emulated, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(
        capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )  # the last: Arm
