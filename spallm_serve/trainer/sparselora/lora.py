"""PEFT's LoRA around a model's linears, and the adapter file that stock PEFT loads."""

from __future__ import annotations

import json
import warnings
from typing import Any

import peft
import torch
from peft.tuners import lora
from torch import nn
from transformers import PreTrainedModel

from spallm_serve.adapter import (
    LORA_A,
    LORA_B,
    LORA_PREFIX,
    Adapter,
    LoraConfig,
    parse_adapter_config,
)
from spallm_serve.errors import UserError
from spallm_serve.layers import SketchedLinear
from spallm_serve.models import decoder_blocks
from spallm_serve.trainer.sparselora.flops import lora_flops
from spallm_serve.trainer.sparselora.settings import SparseLoraSettings
from spallm_serve.trainer.sparselora.slices import is_sliceable, values_of

_NAME = "default"
_Linear = nn.Linear | SketchedLinear


class LoraSet:
    """The LoRAs of a model, newly made: B is zero, so they change nothing yet.

    The layers are PEFT's own. They are put in place one by one, since PEFT 0.21's injection looks
    for a parameter in each layer it wraps and a sketch has none.

    Args:
        model: frozen; linears in its decoder blocks whose last name is among the targets get one.
        settings: rank, alpha, dropout and targets.

    Raises:
        UserError: a target that no decoder block has as a linear layer.
    """

    def __init__(self, model: PreTrainedModel, settings: SparseLoraSettings) -> None:
        self._config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            # PEFT's type is int; a fraction works as well.
            lora_alpha=int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=sorted(settings.targets),
        )
        self._layers = {
            name: self._wrap(parent, child, linear)
            for name, parent, child, linear in _targets(model, settings.targets)
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        """``<module>.lora_A.weight`` float32 ``[rank, in]`` and ``<module>.lora_B.weight``
        ``[out, rank]``, by name."""
        return {
            name + ending: part[_NAME].get_parameter("weight")
            for name, layer in self._layers.items()
            for ending, part in ((LORA_A, layer.lora_A), (LORA_B, layer.lora_B))
        }

    def flops(self) -> int:
        """Operations a token takes in all of them, forward and backward."""
        return lora_flops(sum(parameter.numel() for parameter in self.parameters().values()))

    def adapter(self, base_digest: str | None, base_name: str) -> Adapter:
        """The LoRAs as PEFT would save them, with the digest of their base.

        Args:
            base_digest: of the compressed base; None for a dense one.
            base_name: what ``base_model_name_or_path`` says.
        """
        fields = _as_saved(self._config)
        fields |= {"base_model_name_or_path": base_name, "inference_mode": True}
        config = parse_adapter_config(fields | {"base_digest": base_digest}, "the new adapter")
        assert isinstance(config, LoraConfig)
        tensors = {
            LORA_PREFIX + name: parameter.detach().clone()
            for name, parameter in self.parameters().items()
        }
        return Adapter(config, tensors)

    def _wrap(self, parent: nn.Module, child: str, linear: _Linear) -> lora.Linear:
        with warnings.catch_warnings():
            # It does not know sketched layers, but asks no more of them than their sizes.
            warnings.filterwarnings("ignore", "Unsupported layer type")
            layer = lora.Linear(
                linear, _NAME, self._config, r=self._config.r, lora_alpha=self._config.lora_alpha
            )
        for part in (layer.lora_A, layer.lora_B):
            part.to(device=values_of(linear).device, dtype=torch.float32)
        layer.train(linear.training)
        setattr(parent, child, layer)
        return layer


def _targets(
    model: PreTrainedModel, targets: tuple[str, ...]
) -> list[tuple[str, nn.Module, str, _Linear]]:
    """Name, parent, last name and module of each linear that gets a LoRA."""
    prefix, blocks = decoder_blocks(model)
    linears = {
        f"{prefix}.{name}": module
        for name, module in blocks.named_modules()
        if is_sliceable(module)
    }
    last_names = {name.rpartition(".")[2] for name in linears}
    missing = [target for target in targets if target not in last_names]
    if missing:
        raise UserError(
            f"{type(model).__name__}: no linear layer called {', '.join(missing)} to put a LoRA "
            "on. SparseLoRA is for decoder blocks with self_attn.q_proj, k_proj, v_proj and o_proj "
            "and mlp.gate_proj, up_proj and down_proj; this model's linears are "
            f"{', '.join(sorted(last_names)) or 'of another kind'}"
        )
    parts = {name: name.rpartition(".") for name in linears}
    return [
        (name, model.get_submodule(parts[name][0]), parts[name][2], linear)
        for name, linear in linears.items()
        if parts[name][2] in targets
    ]


def _as_saved(config: peft.LoraConfig) -> dict[str, Any]:
    """A PEFT configuration as its JSON file has it; sets in an order that is always the same."""

    def plain(value: object) -> object:
        return sorted(value) if isinstance(value, set) else str(value)

    fields: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=plain))
    return fields
