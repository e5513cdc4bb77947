"""A base with an adapter in its weights: a model directory that needs no adapter any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spallm_serve.adapter import ROWS, Adapter, LutConfig
from spallm_serve.adapters_store.base import StoredBase
from spallm_serve.adapters_store.delta import changed_modules, weight_delta
from spallm_serve.checkpoint import (
    CODES,
    CONFIG_FILE,
    ESTIMATOR_FILE,
    TABLES,
    copy_companions,
    write_shards,
)
from spallm_serve.compressor.run_directory import check_output
from spallm_serve.errors import UserError
from spallm_serve.models import ModelSource, read_parameter, skeleton
from spallm_serve.sketch import Sketch

# The record of how the base was compressed says nothing of the merged weights.
_LEFT_BEHIND = ("spallm_report.json",)


def merge(
    adapter: Adapter, base: StoredBase, output: Path, on_tensor: Callable[[int], None]
) -> int:
    """Write a model that computes what the base does with the adapter.

    Tables replace the base's: the model stays compressed, with the same codes and base digest.
    Blocks and LoRAs are added to dense weights, in the dtype the base stores them in; a compressed
    base becomes a dense one in bfloat16. One weight is in memory at a time, and those of the shard
    being filled.

    Args:
        adapter: one that was checked against the base.
        base: the base.
        output: directory to make; it appears complete, or not at all.
        on_tensor: called with the number of tensors written so far.

    Returns:
        Bytes of the weights.

    Raises:
        UserError: the output holds something already, or cannot be written.
    """
    check_output(output)
    as_tables = isinstance(adapter.config, LutConfig)
    model = base.skeleton() if as_tables else skeleton(base.source.config)
    untied = set() if as_tables else _untied(adapter, model)
    tensors = (
        _with_tables(adapter, base.source, model)
        if as_tables
        else _with_deltas(adapter, base, model, untied)
    )
    with _staged(output) as staging:
        written = write_shards(_counted(tensors, on_tensor), staging)
        copy_companions(base.source.directory, staging, _LEFT_BEHIND)
        if as_tables and (base.source.directory / ESTIMATOR_FILE).is_file():
            shutil.copyfile(base.source.directory / ESTIMATOR_FILE, staging / ESTIMATOR_FILE)
        config = json.loads((base.source.directory / CONFIG_FILE).read_text())
        if not as_tables:
            config = _dense_config(config, base, untied)
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return written


def tensor_count(adapter: Adapter, base: StoredBase) -> int:
    """How many tensors :func:`merge` writes, but for weights that it unties."""
    as_tables = isinstance(adapter.config, LutConfig)
    model = base.skeleton() if as_tables else skeleton(base.source.config)
    return len(model.state_dict().keys() - model.all_tied_weights_keys.keys())


def _with_tables(
    adapter: Adapter, source: ModelSource, model: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    for name, expected in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        given = adapter.tensors.get(name)
        if given is None:
            yield name, read_parameter(source, name, tuple(expected.shape))
        elif name.endswith(TABLES) and name.removesuffix(TABLES) + ROWS in adapter.tensors:
            rows = adapter.tensors[name.removesuffix(TABLES) + ROWS].long()
            stored = read_parameter(source, name, tuple(expected.shape))
            yield name, stored.index_copy(0, rows, given)
        else:
            # A normalisation stays in the float32 it was trained in, whatever the base's is.
            yield name, given


def _with_deltas(
    adapter: Adapter, base: StoredBase, model: PreTrainedModel, untied: set[str]
) -> Iterator[tuple[str, Tensor]]:
    changed = {f"{module}.weight" for module in changed_modules(adapter)}
    tied = model.all_tied_weights_keys
    for name, expected in model.state_dict().items():
        if name in tied and name not in untied:
            continue
        weight = _dense_tensor(base, tied.get(name, name), tuple(expected.shape), model)
        dtype = weight.dtype if base.sketch is None else torch.bfloat16
        if name in changed:
            module = name.removesuffix(".weight")
            transposed = isinstance(model.get_submodule(module), Conv1D)
            rows, columns = reversed(weight.shape) if transposed else weight.shape
            delta = weight_delta(adapter, module, (rows, columns))
            weight = weight.float() + (delta.T if transposed else delta)
        yield name, weight.to(dtype).contiguous() if weight.is_floating_point() else weight


def _dense_tensor(
    base: StoredBase, name: str, shape: tuple[int, ...], model: PreTrainedModel
) -> Tensor:
    """A parameter as the architecture holds it: as it is stored, or looked up, in float32."""
    module = name.removesuffix(".weight")
    reader = base.source.reader
    if module + CODES not in reader:
        return read_parameter(base.source, name, shape)
    transposed = isinstance(model.get_submodule(module), Conv1D)
    columns = shape[0 if transposed else 1]
    weight = Sketch(reader.read(module + CODES), reader.read(module + TABLES), columns).weight()
    return weight.T if transposed else weight


def _untied(adapter: Adapter, model: PreTrainedModel) -> set[str]:
    """Weights that share their memory with another in the base, which must not change with them."""
    names = {f"{module}.weight" for module in changed_modules(adapter)}
    return names & model.all_tied_weights_keys.keys()


def _dense_config(config: dict[str, Any], base: StoredBase, untied: set[str]) -> dict[str, Any]:
    config = dict(config)
    if untied:
        config["tie_word_embeddings"] = False
    if base.sketch is not None:
        del config["quantization_config"]
        config.pop("torch_dtype", None)  # the name that dtype had before
        config["dtype"] = "bfloat16"
    return config


def _counted(
    tensors: Iterator[tuple[str, Tensor]], on_tensor: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    for count, (name, tensor) in enumerate(tensors, start=1):
        yield name, tensor
        on_tensor(count)


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder that becomes the output when all went well, and else goes away."""
    staging = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a kill may have left
        staging.mkdir(parents=True)
        yield staging
        staging.rename(output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
