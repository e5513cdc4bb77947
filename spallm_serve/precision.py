"""What a device multiplies natively, and which values are numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Types that torch finds the extremes of.
_ORDERED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# So many values make a small tensor; so many of those are looked at together, and so many values
# of a large one: it bounds the memory that takes.
_SMALL, _TOGETHER, _STRETCH = 1 << 16, 64, 1 << 20


def all_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite.

    By its least and its largest, which a NaN would be both of: in one pass and without another
    tensor, where torch's own ``isfinite`` makes two.
    """
    if tensor.dtype not in _ORDERED or tensor.numel() == 0:
        return bool(torch.isfinite(tensor).all())
    least, largest = tensor.aminmax()
    return math.isfinite(least.item()) and math.isfinite(largest.item())


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity; None if there is none.

    Small tensors are looked at together and large ones in parts. An adapter has hundreds of small
    ones, and beside an engine that decodes each call may have to wait for the interpreter.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    for dtype in dict.fromkeys(tensor.dtype for tensor in floating.values()):
        names = [name for name, tensor in floating.items() if tensor.dtype == dtype]
        small = [name for name in names if floating[name].numel() <= _SMALL]
        for first in range(0, len(small), _TOGETHER):
            some = small[first : first + _TOGETHER]
            if not all_finite(torch.cat([floating[name].flatten() for name in some])):
                return next(name for name in some if not all_finite(floating[name]))
        for name in (name for name in names if floating[name].numel() > _SMALL):
            if not all(map(all_finite, floating[name].flatten().split(_STRETCH))):
                return name
    return None


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 as such; where it is emulated, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(
        capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )  # the last: Arm
