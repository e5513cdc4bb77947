"""What ``spallm-train`` does once its flags are read."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import AutoConfig, PreTrainedModel

from spallm_serve.config_file import read_config
from spallm_serve.errors import UserError
from spallm_serve.examples import stream_examples
from spallm_serve.models import linears, load_tokenizer, resolve_model, skeleton
from spallm_serve.preview import preview
from spallm_serve.trainer.run import train
from spallm_serve.trainer.settings import (
    TrainSettings,
    commented_config,
    parse_train_settings,
)
from spallm_serve.trainer.smt.peft_export import export_supertuning


def print_config() -> None:
    """All settings as commented YAML on standard output."""
    print(commented_config(), end="")


def gather(config: Path | None, flags: dict[str, Any], assignments: list[str]) -> TrainSettings:
    """Settings from a file, over them the flags that were given, over these ``--set``.

    Args:
        config: YAML, or None.
        flags: by dotted name; None where not given.
        assignments: ``KEY=VALUE`` with dotted keys and YAML values.

    Raises:
        UserError: a setting that is unknown, missing or out of range.
    """
    raw = read_config(config) if config is not None else {}
    for key, value in flags.items():
        if value is not None:
            _assign(raw, key, value)
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UserError(f"--set {text!r}: expected KEY=VALUE")
        try:
            _assign(raw, key, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise UserError(f"--set {text!r}: the value is not YAML") from error
    return parse_train_settings(raw)


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        inner = raw.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{key}: {section} is no section")
        raw = inner
    raw[leaf] = value


def preview_data(settings: TrainSettings, count: int) -> None:
    """Show the first examples, what is learnt of them coloured."""
    tokenizer = load_tokenizer(resolve_model(settings.base, Path(settings.base)))
    examples = stream_examples(
        settings.data, tokenizer, settings.max_length, strict=settings.strict
    )
    preview(list(islice(examples, count)), tokenizer, Console())


def run_command(
    settings: TrainSettings, output: Path, *, resume: bool, export_peft: Path | None
) -> None:
    """Train and say what came out."""
    if export_peft is not None and settings.method != "smt":
        raise UserError(
            f"--export-peft: only for smt; a {settings.method} adapter "
            + ("is PEFT's already" if settings.method == "sparselora" else "has no form in PEFT")
        )
    dense = _dense_skeleton(settings) if export_peft is not None else None
    console = Console(highlight=False)
    adapter = train(settings, output, resume=resume, console=console)
    if export_peft is not None and dense is not None:
        export_supertuning(adapter, dense, export_peft)
        console.print(f"[b]{export_peft}[/b]: the same for stock PEFT", soft_wrap=True)


def _dense_skeleton(settings: TrainSettings) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(resolve_model(settings.base, Path(settings.base)))
    if getattr(config, "quantization_config", None) is not None:
        raise UserError("--export-peft: PEFT adapts dense layers only, and this base is compressed")
    model = skeleton(config)
    other = {type(module).__name__ for module in linears(model).values()} - {"Linear"}
    if other:
        raise UserError(f"--export-peft: PEFT adapts nn.Linear only, this base has {min(other)}")
    return model
