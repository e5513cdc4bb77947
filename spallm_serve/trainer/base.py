"""The frozen model that an adapter is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spallm_serve.batches import supports_packing
from spallm_serve.errors import UserError
from spallm_serve.identity import base_identity
from spallm_serve.models import load_model, load_tokenizer, resolve_model
from spallm_serve.precision import bfloat16_is_native
from spallm_serve.trainer.model import freeze
from spallm_serve.trainer.settings import TrainSettings


@dataclass(frozen=True)
class Base:
    """An opened base model.

    Attributes:
        name: what the user typed.
        directory: where it is.
        model: frozen, in evaluation mode.
        tokenizer: its tokenizer.
        digest: its identity.
    """

    name: str
    directory: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str


def open_base(settings: TrainSettings, device: torch.device) -> Base:
    """Load the base model frozen, in the precision that the settings say.

    Raises:
        UserError: no such model, or one that cannot be packed for or has a shorter context.
    """
    if Path(settings.base).suffix == ".gguf":
        raise UserError(f"{settings.base}: compress it first, spallm-compress reads .gguf files")
    directory = resolve_model(settings.base, Path(settings.base))
    wanted = {"bf16": True, "fp32": False, "auto": bfloat16_is_native(device)}[settings.precision]
    model = load_model(directory, torch.bfloat16 if wanted else torch.float32)
    freeze(model)
    model.to(device)  # type: ignore[arg-type]
    if settings.packing and not supports_packing(model):
        raise UserError(
            f"--packing: {type(model).__name__} does not keep packed examples apart; "
            "train it without"
        )
    tokenizer = load_tokenizer(directory)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and settings.max_length > context:
        raise UserError(
            f"max_length {settings.max_length} is more than the model's context of {context} tokens"
        )
    return Base(settings.base, directory, model, tokenizer, base_identity(model))
