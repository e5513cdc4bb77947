"""What a training run is told: flags and YAML, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spallm_serve.errors import UserError
from spallm_serve.trainer.curves import Destination
from spallm_serve.trainer.lut.method import LutSettings
from spallm_serve.trainer.smt.method import SmtSettings
from spallm_serve.trainer.sparselora.settings import SparseLoraSettings


class TrainSettings(BaseModel):
    """Settings of a run; the sections ``lut``, ``smt`` and ``sparselora`` are the methods' own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(description="base model: what spallm-compress made, or a dense model")
    data: Path = Field(description="rows to learn, .jsonl, .json or .txt")
    method: Literal["lut", "smt", "sparselora"] = Field(
        default="lut",
        description="lut: tables; smt: blocks of weights; sparselora: a LoRA, cheaply",
    )
    eval_data: Path | None = Field(default=None, description="rows to judge on during training")

    epochs: float = Field(
        default=1.0, gt=0, description="passes over the data, unless steps are given"
    )
    steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    batch_size: int = Field(default=4, ge=1, description="rows in a micro batch")
    accumulation: int = Field(default=4, ge=1, description="micro batches in a step")
    max_length: int = Field(default=512, ge=2, description="tokens in a row; more is cut")
    packing: bool = Field(
        default=False, description="several examples in a row, kept apart by the mask"
    )
    shuffle_buffer: int = Field(
        default=10_000,
        ge=0,
        description="examples that are shuffled at a time; 0 keeps the file's order",
    )
    strict: bool = Field(
        default=False, description="refuse rows that are too long instead of cutting them"
    )

    learning_rate: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="peak rate of AdamW; by default 1e-3 for lut, 3e-4 for the others. Small "
        "models and few bits bear more, large models want less",
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear", description="how the rate goes on after the warm-up"
    )
    warm_up_steps: int = Field(default=10, ge=0, description="steps to the peak rate")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    adam_beta2: float = Field(
        default=0.999, gt=0, lt=1, description="decay of AdamW's second moment"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="same seed, same machine: same adapter"
    )

    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="of activations; what is trained is float32. auto: bf16 where it is native",
    )
    checkpointing: bool = Field(
        default=False,
        description="compute activations again in the backward pass instead of keeping them",
    )
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="auto: a GPU where there is one"
    )

    save_every: int = Field(
        default=50, ge=1, description="steps between checkpoints to resume from"
    )
    eval_every: int = Field(default=50, ge=1, description="steps between evaluations")
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations without a better loss"
    )
    log_to: Destination = Field(
        default="none",
        description="where curves are logged; tensorboard: into the folder runs of the output",
    )

    lut: LutSettings = LutSettings()
    smt: SmtSettings = SmtSettings()
    sparselora: SparseLoraSettings = SparseLoraSettings()

    @property
    def peak_rate(self) -> float:
        """The learning rate, the method's own where none is given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-3 if self.method == "lut" else 3e-4

    @model_validator(mode="after")
    def _together(self) -> TrainSettings:
        if self.patience is not None and self.eval_data is None:
            raise ValueError("patience needs eval_data to judge on")
        return self


def parse_train_settings(raw: dict[str, Any]) -> TrainSettings:
    """Validate settings by name.

    Raises:
        UserError: one that is missing, unknown or out of range.
    """
    try:
        return TrainSettings.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
        raise UserError(
            f"{field or 'settings'}: {problem['msg'].removeprefix('Value error, ')}{given}"
        ) from error


def commented_config() -> str:
    """All settings as YAML with their defaults; what must be given is left to fill in."""
    lines = ["# Settings of spallm-train; flags of the same name win over this file."]
    for name, field in TrainSettings.model_fields.items():
        default = field.default
        if isinstance(default, BaseModel):
            lines += ["", f"{name}:  # used by --method {name}"]
            for own, nested in type(default).model_fields.items():
                value = getattr(default, own)
                lines += [f"  # {nested.description}", f"  {own}: {_yaml(value)}"]
            continue
        value = "FILL-IN" if field.is_required() else _yaml(default)
        lines += [f"# {field.description}", f"{name}: {value}"]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
