"""A fine-tune of another format, moved onto a base's codes: an adapter of tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spallm_serve.adapter import Adapter, LutConfig
from spallm_serve.adapters_store.base import StoredBase, open_base
from spallm_serve.adapters_store.fine_tune import open_fine_tune
from spallm_serve.checkpoint import TABLES
from spallm_serve.compressor.calibration import SELF, calibration_tokens
from spallm_serve.compressor.projection import Projected, project
from spallm_serve.compressor.settings import parse_settings
from spallm_serve.errors import UserError
from spallm_serve.models import open_source


@dataclass(frozen=True)
class Conversion:
    """What came out.

    Attributes:
        adapter: of tables.
        layers: what each of them kept, by module name.
        left_behind: parameters that the fine-tune changed and tables cannot hold.
    """

    adapter: Adapter
    layers: dict[str, Projected]
    left_behind: list[str]


def open_target(name: str, scratch: Path) -> StoredBase:
    """The base to move a fine-tune to (see :func:`spallm_serve.adapters_store.base.open_base`).

    Raises:
        UserError: it is not there, or not compressed.
    """
    base = open_base(name, scratch)
    if base.sketch is None:
        raise UserError(
            f"{name}: is not compressed; only codes take tables (spallm-compress makes them)"
        )
    return base


def convert(
    fine_tune: str,
    base: StoredBase,
    original: str | None,
    tokens: Tensor | None,
    scratch: Path,
    on_layer: Callable[[int, int], None],
) -> Conversion:
    """Move a LoRA, or a model that was fine-tuned whole, onto the codes of a base.

    Args:
        fine_tune: what the user typed.
        base: see :func:`open_target`.
        original: what the base was compressed from; None takes the base for it.
        tokens: see :func:`base_tokens`, or None.
        scratch: where ``.gguf`` files are unpacked.
        on_layer: called with the number of layers done, and of all.

    Raises:
        UserError: the fine-tune does not fit the base, or something is damaged.
    """
    digest = base.digest()
    before = None if original is None else open_source(original, scratch / "original")
    opened = open_fine_tune(fine_tune, base, digest, before, scratch / "fine-tune")
    done: list[str] = []

    def count(module: str, layer: Projected) -> None:
        done.append(module)
        on_layer(len(done), len(opened.layers.modules))

    layers = project(base.source, opened.layers, tokens, count)
    tensors = {module + TABLES: layer.tables for module, layer in layers.items()}
    config = LutConfig(base_digest=digest, base_model_name_or_path=base.name)
    return Conversion(Adapter(config, tensors | opened.norms), layers, opened.left_behind)


def base_tokens(base: StoredBase, text: str, samples: int, seqlen: int) -> Tensor:
    """Windows of calibration text, int64 ``[windows, seqlen]``.

    Args:
        base: its tokenizer is used.
        text: a .txt or .jsonl file, or ``hf:DATASET``.
        samples: windows at most.
        seqlen: tokens in one.

    Raises:
        UserError: no such text, or too short a one.
    """
    if text == SELF:
        raise UserError("--calibration: give text, a .txt or .jsonl file or hf:DATASET")
    settings = parse_settings({"calibration": text, "samples": samples, "seqlen": seqlen})
    return calibration_tokens(base.source, settings, lambda step: None)
