"""A model with an adapter in it, ready to run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.adapter import (
    ROWS,
    Adapter,
    LoraConfig,
    LutConfig,
    SmtConfig,
    lora_modules,
)
from spallm_serve.adapter_structure import check_structure
from spallm_serve.checkpoint import TABLES
from spallm_serve.errors import UserError
from spallm_serve.identity import base_identity
from spallm_serve.layers import SketchedLinear, is_linear, weight_shape
from spallm_serve.models import is_norm
from spallm_serve.trainer.smt.method import attach


def apply_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put an adapter into the model it was trained on, for inference.

    Tables replace the base's and cost nothing; blocks and LoRAs are added in the forward pass.

    Args:
        model: the base, changed in place.
        adapter: of any kind.

    Raises:
        UserError: made for another base, or it does not fit the model's layers. The model is then
            as it was.
    """
    expect_base(adapter, base_identity(model))
    insert_adapter(model, adapter)


def expect_base(adapter: Adapter, digest: str) -> None:
    """Refuse a base that the adapter was not made for; a LoRA need not name one.

    Raises:
        UserError: another base.
    """
    if adapter.config.base_digest not in (None, digest):
        raise UserError(
            f"the adapter was made for the base {adapter.config.base_digest}, this one is "
            f"{digest}; an adapter only fits what it was trained on"
        )


def insert_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """:func:`apply_adapter` without asking which base the model is.

    The model may be a skeleton without weights: so it is seen whether an adapter fits.

    Raises:
        UserError: it is not what its kind needs, or does not fit the model's layers. The model is
            then as it was.
    """
    check_structure(adapter)
    if isinstance(adapter.config, SmtConfig):
        attach(model, adapter)
    elif isinstance(adapter.config, LutConfig):
        _replace_tables(model, adapter)
    else:
        _add_lora(model, adapter, adapter.config)


def _replace_tables(model: PreTrainedModel, adapter: Adapter) -> None:
    tables = _checked_tables(model, adapter)
    norms = _checked_norms(model, adapter)
    for name, values in tables.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, SketchedLinear)
        layer.tables = values.to(layer.tables)
    with torch.no_grad():
        for name, values in norms.items():
            model.get_parameter(name).copy_(values)


def _checked_tables(model: PreTrainedModel, adapter: Adapter) -> dict[str, Tensor]:
    """Every changed layer's whole tables, by the layer's name."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name in adapter.modules(TABLES):
        layer = modules.get(name)
        if not isinstance(layer, SketchedLinear):
            raise UserError(f"{name}{TABLES}: the base has no such compressed layer")
        given, rows = adapter.tensors[name + TABLES], adapter.tensors.get(name + ROWS)
        height, groups, entries = layer.tables.shape
        expected = [height if rows is None else len(rows), groups, entries]
        if list(given.shape) != expected:
            raise UserError(f"{name}{TABLES}: expected {expected}, got {list(given.shape)}")
        if rows is None:
            found[name] = given
            continue
        if int(rows[-1]) >= height:  # they ascend
            raise UserError(f"{name}{ROWS}: expected 0 to {height - 1}, got {int(rows[-1])}")
        where = rows.to(layer.tables.device).long()
        found[name] = layer.tables.index_copy(0, where, given.to(layer.tables))
    return found


def _checked_norms(model: PreTrainedModel, adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor that is neither tables nor rows: those of normalisations."""
    norms = {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if is_norm(module)
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    found: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        if name.endswith((TABLES, ROWS)):
            continue
        if name not in norms:
            raise UserError(f"{name}: neither tables nor part of a normalisation of this base")
        if tensor.shape != norms[name].shape:
            raise UserError(f"{name}: expected {list(norms[name].shape)}, got {list(tensor.shape)}")
        found[name] = tensor
    return found


class LoraLinear(nn.Module):
    """A linear layer and a low-rank product beside it: ``y = base(x) + scale B (A x)``.

    Args:
        base: the layer.
        a, b: ``[r, in]`` and ``[out, r]``.
        scale: of the product.
    """

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.register_buffer("a", a.float())
        self.register_buffer("b", b.float())

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in the dtype of x."""
        added = (x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T
        y: Tensor = self.base(x) + self.scale * added
        return y


def _add_lora(model: PreTrainedModel, adapter: Adapter, config: LoraConfig) -> None:
    modules = dict(model.named_modules())
    layers: dict[str, LoraLinear] = {}
    for name, (a, b) in lora_modules(adapter).items():
        if name not in modules or not is_linear(modules[name]):
            raise UserError(f"{name}: the base has no such linear layer")
        shape = weight_shape(modules[name])
        expected = [config.r, shape[1]], [shape[0], config.r]
        if [list(a.shape), list(b.shape)] != list(expected):
            raise UserError(
                f"{name}: expected lora_A {expected[0]} and lora_B {expected[1]}, got "
                f"{list(a.shape)} and {list(b.shape)}"
            )
        layers[name] = LoraLinear(modules[name], a, b, config.scale)
    for name, layer in layers.items():
        model.set_submodule(name, layer.to(model.device))
