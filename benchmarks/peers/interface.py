"""What a peer must offer, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass(frozen=True)
class PeerResult:
    """A model compressed by a peer, ready for measurement as an ordinary dense model.

    Attributes:
        name: the peer, as a table of results should call it.
        setting: one of the peer's ``SETTINGS``.
        bits_per_weight: bits stored for the linear layers inside the transformer blocks (codes,
            scales, zero points, tables, group indices), divided by the number of their weights.
            Embeddings, norms, biases and the output head count on neither side.
        seconds: wall-clock time of compression: calibration included, reading the model and
            writing it back as dense weights excluded.
        model: the causal language model in float32 whose block linears hold the values that the
            compressed form decodes to; everything else is as it was in the input.
        peak_rss_bytes: the process's largest resident set during compression, with the loaded
            model in it; ``None`` where the platform does not tell.
    """

    name: str
    setting: str
    bits_per_weight: float
    seconds: float
    model: torch.nn.Module
    peak_rss_bytes: int | None = None


class Compress(Protocol):
    """The function ``compress`` of a peer module."""

    def __call__(
        self, model_dir: Path, calibration: torch.Tensor, setting: str, scratch: Path
    ) -> PeerResult:
        """Compress the block linears of a causal language model.

        Args:
            model_dir: a Hugging Face model directory; it is only read.
            calibration: token windows, int64 ``[windows, tokens]``; peers that look at weights
                alone ignore it.
            setting: one of the module's ``SETTINGS``.
            scratch: an existing directory for temporary files; the peer removes what it puts there.

        Raises:
            ValueError: the setting is unknown, or the model is of a kind the peer cannot take.
            MissingPackageError: a package that the peer wraps is not installed.
        """
        ...


class Peer(Protocol):
    """What a peer module looks like from outside."""

    SETTINGS: tuple[str, ...]
    """The settings worth measuring, from most to fewest bits."""

    compress: Compress
