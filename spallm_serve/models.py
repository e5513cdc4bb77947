"""Open any Hugging Face causal LM or .gguf file; walk its blocks; name its linears.

A model is built as a skeleton whose parameters have no memory; weights are brought in for one
module at a time and dropped again, so that no more than a block or two is ever held.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from spallm_serve.errors import UserError
from spallm_serve.shards import ShardReader

_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """A model as a local directory of configuration, tokenizer and safetensors shards.

    Attributes:
        directory: where the files are.
        config: the model's configuration.
        reader: its weights.
    """

    directory: Path
    config: PreTrainedConfig
    reader: ShardReader

    def check_finite(self) -> None:
        """Read every weight once, so that a damaged one is found before hours of work.

        Raises:
            UserError: names the first weight that holds NaN or Inf.
        """
        for name in self.reader:
            _check_finite(self.reader.map(name), name, self.directory)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            UserError: the directory has none.
        """
        return load_tokenizer(self.directory)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises:
        UserError: the directory has none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: no usable tokenizer ({first_line(error)})") from error
    # For some architectures transformers makes up an empty one where the files are missing.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise UserError(f"{directory}: no usable tokenizer (its files are missing)")
    return tokenizer


def open_source(model: str, scratch: Path) -> ModelSource:
    """Open a model given as a local directory, a ``.gguf`` file or a hub id.

    Args:
        model: what the user typed.
        scratch: where a ``.gguf`` file is unpacked to bfloat16 shards (once; needs the whole model
            in memory that one time).

    Raises:
        UserError: not found, not a causal LM, or damaged weights.
    """
    directory = resolve_model(model, scratch)
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model}: no usable config.json ({first_line(error)})") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{model}: is already quantized; give the original, uncompressed model")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{model}: model type {config.model_type!r} is not a causal language model")
    return ModelSource(directory, config, ShardReader(directory))


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A whole model, compressed or not, ready to run.

    Raises:
        UserError: not a causal LM, or damaged.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{directory}: cannot be loaded ({first_line(error)})") from error
    return model.eval()


def resolve_model(model: str, scratch: Path) -> Path:
    """The local directory of safetensors shards for what the user typed (see :func:`open_source`).

    Raises:
        UserError: there is no such directory, file or hub model.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _unpack_gguf(path, scratch)
    if path.exists():
        raise UserError(f"{model}: expected a model directory, a .gguf file or a hub id")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f"{model}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{model}: no such directory here, and the hub gave: {first_line(error)}"
        ) from error


def _unpack_gguf(path: Path, scratch: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if (scratch / "config.json").is_file():
        return scratch
    from transformers import GgufConfig

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # whatever the parser trips over, the file is at fault
        raise UserError(f"{path}: cannot be read as GGUF ({first_line(error)})") from error
    partial = scratch.with_name(scratch.name + ".partial")
    loaded.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(scratch, ignore_errors=True)  # what a kill may have left of it
    partial.rename(scratch)
    return scratch


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its parameters; buffers that are computed, such as rotary
    frequencies, are real. In evaluation mode."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its module name.

    Raises:
        UserError: the model has no list of as many modules as its configuration has layers.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return name, module
    raise UserError(
        f"{type(model).__name__}: found no list of {layers} decoder blocks; "
        "this architecture is not supported"
    )


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by their name inside it (``nn.Linear`` and GPT-2's Conv1D)."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation: LayerNorm, RMSNorm or an architecture's own."""
    return type(module).__name__.lower().endswith("norm")


def weight_of(linear: nn.Module) -> Tensor:
    """A linear layer's weight as ``[out, in]``; a view, also where Conv1D stores it transposed."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(linear, Conv1D) else weight.detach()


def materialize(
    module: nn.Module,
    prefix: str,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    skip: Collection[str] = (),
) -> None:
    """Bring in the weights of a module, and of all below it, that have no memory yet.

    Embeddings keep the dtype they are stored in; everything else becomes ``dtype``.

    Args:
        module: part of a :func:`skeleton`.
        prefix: the module's name in the model.
        source: where the weights are.
        device: where they go.
        dtype: floating point type of the weights.
        skip: names of parameters that are left without.

    Raises:
        UserError: a weight the checkpoint does not hold, has in another shape, or that holds NaN
            or Inf.
    """
    for owner_name, owner in module.named_modules(prefix=prefix):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            full_name = f"{owner_name}.{name}" if owner_name else name
            if not parameter.is_meta or full_name in skip:
                continue
            loaded = read_parameter(source, full_name, tuple(parameter.shape))
            kept = loaded.dtype if isinstance(owner, nn.Embedding) else dtype
            loaded = loaded.to(device, kept)
            setattr(owner, name, nn.Parameter(loaded, requires_grad=False))


def map_weights(model: PreTrainedModel, source: ModelSource, device: torch.device) -> None:
    """Give a whole skeleton its weights in the dtype they are stored in, mapped from the files.

    On the CPU nothing is copied: the pages belong to the system's file cache.

    Raises:
        UserError: as :func:`materialize`.
    """
    tied = set(model.all_tied_weights_keys)
    for name, parameter in list(model.named_parameters()):
        if name in tied:
            continue
        key = checked_name(source, name, tuple(parameter.shape))
        owner, _, leaf = name.rpartition(".")
        mapped = nn.Parameter(source.reader.map(key).to(device), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, mapped)
    model.tie_weights()


def read_parameter(source: ModelSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """One checked parameter in the dtype it is stored in (errors: see :func:`materialize`)."""
    key = checked_name(source, name, shape)
    loaded = source.reader.read(key)
    _check_finite(loaded, key, source.directory)
    return loaded


def _check_finite(weight: Tensor, name: str, directory: Path) -> None:
    # A sum is NaN or Inf if a term is, and needs no mask as large as the weight.
    if weight.is_floating_point() and not bool(torch.isfinite(weight.sum(dtype=torch.float32))):
        raise UserError(f"{directory}: {name} holds NaN or Inf; the model is damaged")


def checked_name(source: ModelSource, name: str, shape: tuple[int, ...]) -> str:
    """What the checkpoint calls a parameter of this shape: some were saved without the base
    model's prefix.

    Raises:
        UserError: the checkpoint holds no such weight, or in another shape.
    """
    bare = name.split(".", 1)[1] if "." in name else name
    for key in (name, bare):
        if key not in source.reader:
            continue
        if source.reader.shape(key) != shape:
            raise UserError(
                f"{source.directory}: {key} has shape {list(source.reader.shape(key))}, "
                f"the configuration says {list(shape)}"
            )
        return key
    raise UserError(
        f"{source.directory}: the checkpoint holds no weight {name}; "
        "if it is an older or renamed layout, load it with transformers and save it again"
    )


def dematerialize(module: nn.Module) -> None:
    """Give the memory of a module's parameters back."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))


def matching(names: Iterator[str] | list[str], pattern: str) -> list[str]:
    """The module names that a GLOB such as ``*.down_proj`` or ``model.layers.0.*`` selects."""
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def first_line(error: Any) -> str:
    """An exception's message on one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
