"""A base on disk, of which no weight is in memory; and whether an adapter fits it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from spallm_serve.adapted import expect_base, insert_adapter
from spallm_serve.adapter import Adapter
from spallm_serve.checkpoint import SketchConfig, read_sketch_config
from spallm_serve.errors import UserError
from spallm_serve.hf_quantizer import SpallmConfig, SpallmQuantizer
from spallm_serve.identity import stored_identity
from spallm_serve.models import (
    ModelSource,
    checked_name,
    first_line,
    open_source,
    resolve_model,
    skeleton,
)
from spallm_serve.shards import ShardReader


@dataclass(frozen=True)
class StoredBase:
    """An opened base.

    Attributes:
        name: what the user typed.
        source: its configuration and weights.
        sketch: how it was compressed; None for a dense one.
    """

    name: str
    source: ModelSource
    sketch: SketchConfig | None

    def skeleton(self) -> PreTrainedModel:
        """The model without memory for its weights, compressed layers where it has them."""
        model = skeleton(self.source.config)
        if self.sketch is not None:
            config = SpallmConfig(**self.sketch.model_dump())
            SpallmQuantizer(config, pre_quantized=True).preprocess_model(model)
        return model

    def digest(self) -> str:
        """Its identity, from all codes or weights as they are.

        Raises:
            UserError: they are damaged.
        """
        return stored_identity(self.source)


def open_base(name: str, scratch: Path) -> StoredBase:
    """Open a base, compressed or dense.

    Args:
        name: directory, ``.gguf`` file or hub id.
        scratch: where a ``.gguf`` file is unpacked.

    Raises:
        UserError: not found, no causal LM, or compressed by something else.
    """
    directory = resolve_model(name, scratch)
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: no usable config.json ({first_line(error)})") from error
    if getattr(config, "quantization_config", None) is None:
        return StoredBase(name, open_source(str(directory), scratch), None)
    sketch = read_sketch_config(directory)
    return StoredBase(name, ModelSource(directory, config, ShardReader(directory)), sketch)


def check_fits(adapter: Adapter, base: StoredBase) -> str:
    """Check an adapter against a base: names, shapes and dtypes, then what the base is.

    The base's own shapes are those of its configuration; its files must agree.

    Returns:
        The base's digest.

    Raises:
        UserError: it does not fit, was made for another base, or the base is damaged.
    """
    model = base.skeleton()
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        if name not in tied:
            checked_name(base.source, name, tuple(tensor.shape))
    insert_adapter(model, adapter)
    digest = base.digest()
    expect_base(adapter, digest)
    return digest
