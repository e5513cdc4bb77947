"""Compressed models for measuring speed, which does not depend on how well they are calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import parse_settings

_CALIBRATION = {"samples": 2, "seqlen": 64}


def quick_base(model_dir: Path, output: Path, settings: dict[str, Any]) -> Path:
    """Compress a model on next to no text, if that was not done before.

    Args:
        model_dir: the original.
        output: where it goes.
        settings: the compressor's.
    """
    if not (output / "config.json").is_file():
        compress(str(model_dir), output, parse_settings(_CALIBRATION | settings), SilentObserver())
    return output
