"""Registers the "spallm" quantizer with transformers, so that
``AutoModelForCausalLM.from_pretrained`` reads compressed checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spallm_serve.checkpoint import QUANT_METHOD, SketchConfig, check_digest, parse_sketch_config
from spallm_serve.layers import SketchedEmbedding, SketchedLinear, TiedHead
from spallm_serve.sketch import base_digest


@register_quantization_config(QUANT_METHOD)
class SpallmConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """transformers' view of :class:`SketchConfig`."""

    def __init__(self, **raw: Any) -> None:
        raw.setdefault("quant_method", QUANT_METHOD)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.sketch: SketchConfig = parse_sketch_config(raw, "quantization_config")

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return self.sketch.model_dump()


@register_quantizer(QUANT_METHOD)
class SpallmQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts sketched layers in place before the weights come and checks the codes after."""

    quantization_config: SpallmConfig
    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config: SketchConfig = self.quantization_config.sketch
        dtype = model.dtype
        for name in config.embeddings:
            _replace(model, name, _sketched_embedding(model.get_submodule(name), name, config))
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.Linear | Conv1D) or name in config.skipped:
                continue
            tied = _tied_embedding(model, name)
            if tied is not None:
                _replace(model, name, TiedHead(tied, module.bias))
            else:
                _replace(model, name, _sketched_linear(module, name, config, dtype))
        if config.embeddings:
            # The head reads the embedding's sketch; there is no weight left to tie.
            model.all_tied_weights_keys = {}
            model._tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        planes = {
            name: module.codes
            for name, module in model.named_modules()
            if isinstance(module, SketchedLinear | SketchedEmbedding)
        }
        found = base_digest(planes)
        check_digest(found, self.quantization_config.sketch, str(model.config._name_or_path))
        _leave_files(model)

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes codes and tables as they were read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are trained by this project's own trainer, not through transformers' hooks."""
        return False


def _leave_files(model: nn.Module) -> None:
    """Copy everything but the linears' codes out of the mapped files.

    The first product puts a layer's codes into the order of a kernel. Once nothing else lies in a
    file it is unmapped, and codes are in memory once.
    """
    # New tensors, for the old ones are views, whose bases would stay; one for all that share it.
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in both:
            for name, tensor in held.items():
                if tensor is None or (isinstance(module, SketchedLinear) and name == "codes"):
                    continue
                if id(tensor) not in copies:
                    copy = tensor.detach().clone()
                    if isinstance(tensor, nn.Parameter):
                        copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
                    copies[id(tensor)] = tensor, copy
                held[name] = copies[id(tensor)][1]


def _sketched_linear(
    module: nn.Module, name: str, config: SketchConfig, dtype: torch.dtype
) -> SketchedLinear:
    assert isinstance(module.weight, torch.Tensor)
    rows, columns = module.weight.shape
    if isinstance(module, Conv1D):
        rows, columns = columns, rows
    layer = config.layer(name)
    has_bias = module.bias is not None
    return SketchedLinear(columns, rows, layer.bits, layer.groups_per_row, has_bias, dtype, "meta")


def _sketched_embedding(module: nn.Module, name: str, config: SketchConfig) -> SketchedEmbedding:
    assert isinstance(module, nn.Embedding)
    layer = config.layer(name)
    scale = getattr(module, "scalar_embed_scale", None)
    return SketchedEmbedding(
        module.num_embeddings,
        module.embedding_dim,
        layer.bits,
        layer.groups_per_row,
        scale,
        module.weight.dtype,
        "meta",
    )


def _tied_embedding(model: PreTrainedModel, name: str) -> SketchedEmbedding | None:
    """The sketched embedding that the linear ``name`` shares its weight with, if any."""
    source = getattr(model, "all_tied_weights_keys", {}).get(f"{name}.weight")
    if source is None:
        return None
    module = model.get_submodule(source.removesuffix(".weight"))
    return module if isinstance(module, SketchedEmbedding) else None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, leaf, module)
    if not parent._parameters and not parent._buffers:
        # It has nothing of its own to initialise, and some architectures (GPT-2) would reach into
        # the weight of the linear that is no longer there.
        parent._is_hf_initialized = True  # type: ignore[assignment]
