"""Fine-tunes of other formats: a PEFT LoRA, or a whole model; as weights of the base's layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.adapted import insert_adapter
from spallm_serve.adapter import Adapter, LoraConfig, expect_kind
from spallm_serve.adapter_files import CONFIG_FILE, read_adapter
from spallm_serve.adapters_store.base import StoredBase
from spallm_serve.adapters_store.delta import changed_modules, lora_delta
from spallm_serve.checkpoint import CODES
from spallm_serve.compressor.projection import FineTune
from spallm_serve.errors import UserError
from spallm_serve.identity import stored_identity, stored_weight
from spallm_serve.layers import SketchedLinear
from spallm_serve.models import ModelSource, is_norm, open_source, read_parameter, skeleton


@dataclass(frozen=True)
class LoraFineTune:
    """A LoRA, which is a change of weights in itself.

    Attributes:
        adapter, config: the LoRA.
        modules: what it changes.
    """

    adapter: Adapter
    config: LoraConfig
    modules: list[str]

    def weights(self, module: str, base: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`spallm_serve.compressor.projection.FineTune.weights`."""
        return base + lora_delta(self.adapter, self.config, module), base


@dataclass(frozen=True)
class ModelFineTune:
    """A model that was fine-tuned whole.

    Where the original is known, what changed is added to what the base stands for: the base's
    tables, which were fitted with more than this, stay as they are where nothing changed.

    Attributes:
        source: its weights.
        original: what it was before, or None; without it every layer counts as changed.
        dense: a skeleton of it.
        modules: compressed layers of the base that changed.
    """

    source: ModelSource
    original: ModelSource | None
    dense: PreTrainedModel
    modules: list[str]

    def weights(self, module: str, base: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`spallm_serve.compressor.projection.FineTune.weights`."""
        linear = self.dense.get_submodule(module)
        after = stored_weight(self.source, module, linear).float()
        if self.original is None:
            return after, base
        return base + after - stored_weight(self.original, module, linear).float(), base


@dataclass(frozen=True)
class Opened:
    """A fine-tune.

    Attributes:
        layers: its weights for the base's compressed layers.
        norms: normalisations that changed, float32, by parameter name.
        left_behind: what changed and has no place in an adapter of tables: biases, embeddings, a
            dense head.
    """

    layers: FineTune
    norms: dict[str, Tensor] = field(default_factory=dict)
    left_behind: list[str] = field(default_factory=list)


def open_fine_tune(
    name: str, base: StoredBase, digest: str, original: ModelSource | None, scratch: Path
) -> Opened:
    """Open a fine-tune to move onto a compressed base.

    Args:
        name: a PEFT LoRA's directory, or a model: directory, ``.gguf`` file or hub id.
        base: the compressed base.
        digest: of the base.
        original: what was compressed, if it is at hand.
        scratch: where a ``.gguf`` file is unpacked.

    Raises:
        UserError: neither of both, damaged, of another shape, or it changes a layer that the base
            has not compressed.
    """
    if (Path(name) / CONFIG_FILE).is_file():
        return Opened(_open_lora(Path(name), base, digest, original))
    return _open_model(name, base, original, scratch)


def _open_lora(
    directory: Path, base: StoredBase, digest: str, original: ModelSource | None
) -> LoraFineTune:
    adapter = read_adapter(directory)
    config = expect_kind(adapter, LoraConfig, f"{directory}: only a LoRA can be moved")
    made_for = config.base_digest
    if made_for not in (None, digest) and (
        original is None or made_for != stored_identity(original)
    ):
        raise UserError(
            f"{directory}: was trained on the base {made_for}, this one is {digest}"
            + ("; give what it was trained on as --original" if original is None else "")
        )
    model = base.skeleton()
    modules = changed_modules(adapter)
    layers = {module: dict(model.named_modules()).get(module) for module in modules}
    insert_adapter(model, adapter)
    for module, layer in layers.items():
        if not isinstance(layer, SketchedLinear):
            raise UserError(
                f"{module}: the LoRA changes it, but the base has not compressed it, so that it "
                "has no tables"
            )
    return LoraFineTune(adapter, config, modules)


def _open_model(name: str, base: StoredBase, original: ModelSource | None, scratch: Path) -> Opened:
    source = open_source(name, scratch)
    dense = skeleton(base.source.config)
    _expect_same_shapes(name, skeleton(source.config), dense)
    compressed = [
        module
        for module, layer in base.skeleton().named_modules()
        if isinstance(layer, SketchedLinear)
    ]
    modules = [
        module
        for module in compressed
        if original is None or _changed(module, source, original, dense.get_submodule(module))
    ]
    norms, left_behind = _beside(source, base.source, original, dense, compressed)
    if not modules:
        raise UserError(f"{name}: no compressed layer of the base differs from the original")
    return Opened(ModelFineTune(source, original, dense, modules), norms, left_behind)


def _expect_same_shapes(name: str, model: PreTrainedModel, base: PreTrainedModel) -> None:
    there, here = (
        {name: list(tensor.shape) for name, tensor in each.state_dict().items()}
        for each in (model, base)
    )
    for parameter in sorted(there.keys() | here.keys()):
        if there.get(parameter) != here.get(parameter):
            raise UserError(
                f"{name}: {parameter} has shape {there.get(parameter)}, in the base "
                f"{here.get(parameter)}; it is no fine-tune of this base"
            )


def _changed(module: str, source: ModelSource, original: ModelSource, linear: nn.Module) -> bool:
    after, before = (stored_weight(model, module, linear) for model in (source, original))
    return not torch.equal(after.float(), before.float())


def _beside(
    source: ModelSource,
    base: ModelSource,
    original: ModelSource | None,
    dense: PreTrainedModel,
    compressed: list[str],
) -> tuple[dict[str, Tensor], list[str]]:
    """What changed beside the compressed layers: normalisations, and names of all else."""
    of_norms = {
        f"{name}.{leaf}"
        for name, module in dense.named_modules()
        if is_norm(module)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    of_layers = {f"{module}.weight" for module in compressed}
    norms: dict[str, Tensor] = {}
    left_behind: list[str] = []
    for name, parameter in dense.named_parameters():
        if name in of_layers or name in dense.all_tied_weights_keys:
            continue
        shape = tuple(parameter.shape)
        after = read_parameter(source, name, shape).float()
        if name.removesuffix(".weight") + CODES in base.reader and original is None:
            continue  # a compressed embedding: what it was is not known
        before = read_parameter(original or base, name, shape).float()
        if torch.equal(after, before):
            continue
        if name in of_norms:
            norms[name] = after
        else:
            left_behind.append(name)
    return norms, left_behind
