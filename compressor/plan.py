"""Which layers are compressed, and to what format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from spallm_serve.checkpoint import LayerFormat
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.errors import UserError
from spallm_serve.models import decoder_blocks, linears, matching, weight_of
from spallm_serve.sketch import sketch_nbytes


@dataclass(frozen=True)
class PlannedLayer:
    """A layer to compress.

    Attributes:
        rows, columns: shape of its weight ``[out, in]``.
        format: bits and groups per row.
        fixed: whether the user named its bits, so that automatic allocation leaves them alone.
    """

    rows: int
    columns: int
    format: LayerFormat
    fixed: bool

    @property
    def nbytes(self) -> int:
        """Codes and tables on disk."""
        return sketch_nbytes(self.rows, self.columns, self.format.bits, self.format.groups_per_row)

    @property
    def weight_count(self) -> int:
        """Weights it stands for."""
        return self.rows * self.columns


@dataclass(frozen=True)
class CompressionPlan:
    """What a run will do to each linear and embedding.

    Attributes:
        layers: linears in the blocks that are compressed, in the model's order.
        embeddings: embeddings (and an untied output head) that are compressed.
        skipped: all other linears.
    """

    layers: dict[str, PlannedLayer]
    embeddings: dict[str, PlannedLayer]
    skipped: list[str]


def make_plan(model: PreTrainedModel, settings: CompressSettings) -> CompressionPlan:
    """Decide for every linear of the blocks, and for embeddings when asked.

    Args:
        model: a skeleton.
        settings: of the run.

    Raises:
        UserError: a GLOB that matches nothing, groups per row that do not divide a width, or
            nothing left to compress.
    """
    prefix, blocks = decoder_blocks(model)
    candidates = {f"{prefix}.{name}": module for name, module in linears(blocks).items()}
    names = list(candidates)
    skipped = set()
    for pattern in settings.skip:
        skipped.update(_matches(names, pattern, "--skip"))
    bits_of: dict[str, int] = {}
    for pattern, bits in settings.bits_for:
        bits_of.update(dict.fromkeys(_matches(names, pattern, "--bits-for"), bits))
    layers = {
        name: _planned(name, module, bits_of.get(name), settings.bits, settings)
        for name, module in candidates.items()
        if name not in skipped
    }
    if not layers:
        raise UserError("nothing to compress: --skip leaves out every linear of the blocks")
    embeddings = _plan_embeddings(model, settings)
    others = [
        name
        for name in linears(model)
        if name not in layers and name not in embeddings and not _is_tied(model, name, embeddings)
    ]
    return CompressionPlan(layers, embeddings, others)


def with_bits(plan: CompressionPlan, bits: Mapping[str, int]) -> CompressionPlan:
    """The plan with other bits for the linears of the blocks."""
    layers = {
        name: replace(
            layer,
            format=LayerFormat.model_validate({**layer.format.model_dump(), "bits": bits[name]}),
        )
        for name, layer in plan.layers.items()
    }
    return replace(plan, layers=layers)


def _plan_embeddings(model: PreTrainedModel, settings: CompressSettings) -> dict[str, PlannedLayer]:
    if settings.embeddings is None:
        return {}
    name_of = {id(module): name for name, module in model.named_modules()}
    planned: dict[str, PlannedLayer] = {}
    embedding = model.get_input_embeddings()
    name = name_of[id(embedding)]
    planned[name] = _planned(name, embedding, settings.embeddings, settings.embeddings, settings)
    head = model.get_output_embeddings()
    if head is not None and f"{name_of[id(head)]}.weight" not in model.all_tied_weights_keys:
        name = name_of[id(head)]
        planned[name] = _planned(name, head, settings.embeddings, settings.embeddings, settings)
    return planned


def _is_tied(model: PreTrainedModel, name: str, embeddings: dict[str, PlannedLayer]) -> bool:
    source = model.all_tied_weights_keys.get(f"{name}.weight", "")
    return source.removesuffix(".weight") in embeddings


def _planned(
    name: str, module: nn.Module, named_bits: int | None, bits: int, settings: CompressSettings
) -> PlannedLayer:
    rows, columns = weight_of(module).shape
    groups = settings.groups_per_row
    if columns % groups:
        fits = max(g for g in range(1, groups + 1) if columns % g == 0)
        raise UserError(
            f"{name}: --groups-per-row {groups} does not divide its width {columns}; {fits} does"
        )
    chosen = LayerFormat.model_validate(
        {"bits": bits if named_bits is None else named_bits, "groups_per_row": groups}
    )
    return PlannedLayer(rows, columns, chosen, fixed=named_bits is not None)


def _matches(names: list[str], pattern: str, option: str) -> list[str]:
    found = matching(names, pattern)
    if not found:
        raise UserError(
            f"{option} {pattern!r} matches no linear layer; they are named like {names[0]!r}"
        )
    return found
