"""A normalisation with another weight for the tokens of some slots."""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.server.slotted import StepSlots


class SlottedNorm:
    """An RMS normalisation (Zhang and Sennrich 2019) whose weight adapters may replace.

    The base's weight is applied to all tokens by the engine; here those tokens are done anew whose
    slots have a weight of their own.

    Args:
        width: of the weight.
        epsilon: added to the mean square.
        offset: what the architecture adds to the weight (Gemma: 1).
        device: of the activations.
    """

    def __init__(
        self, width: int, epsilon: float, offset: float, device: torch.device | str = "cpu"
    ) -> None:
        self.width = width
        self._device = device
        self._epsilon, self._offset = epsilon, offset
        self._weights: dict[int, Tensor] = {}

    def fill(self, slot: int, weight: Tensor | None) -> None:
        """Put a weight ``[width]`` into a slot that no token uses; None for the base's."""
        self._weights.pop(slot, None)
        if weight is not None:
            self._weights[slot] = weight.to(self._device)

    def correct(self, y: Tensor, x: Tensor, step: StepSlots) -> None:
        """Overwrite what the base's weight gave.

        Args:
            y: ``[tokens, ..., width]``, of the base's weight.
            x: of the same shape, what was normalised.
            step: whose token each is.
        """
        if not self._weights:
            return
        for slot, tokens in step.runs:
            weight = self._weights.get(slot)
            if weight is not None:
                y[tokens] = self._normalised(x[tokens], weight)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        values = x.float()
        scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + self._epsilon)
        if self._offset:  # Gemma multiplies in float32, the others in the model's dtype
            return (values * scale * (weight.float() + self._offset)).to(x.dtype)
        return (values * scale).to(x.dtype) * weight
