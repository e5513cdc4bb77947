"""Curves of a run in TensorBoard or Weights & Biases, both extras."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from spallm_serve.errors import UserError

Destination = Literal["none", "tensorboard", "wandb"]


def curve_callbacks(log_to: Destination, folder: Path) -> list[TrainerCallback]:
    """What writes a run's curves.

    Args:
        log_to: where to; Weights & Biases is told by its own environment variables.
        folder: for TensorBoard's files; a run that goes on adds to them.

    Raises:
        UserError: the package is not installed.
    """
    if log_to == "none":
        return []
    if importlib.util.find_spec(log_to) is None:
        raise UserError(
            f"log_to: {log_to} is not installed; pip install 'spallm-serve[train]', or log_to none"
        )
    if log_to == "wandb":
        return [WandbCallback()]
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder)))]
