"""Compress one transformer block whose inputs the blocks before it, already compressed, made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spallm_serve.checkpoint import LayerFormat
from spallm_serve.compressor.hessian import HessianAccumulator, settle_dead_columns
from spallm_serve.compressor.plan import PlannedLayer
from spallm_serve.compressor.record import LayerRecord, TableSample, layer_record
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.compressor.sketching import Curvature, curvature, sketch_rows
from spallm_serve.compressor.streaming import BlockInputs, for_each_input, group_by_input
from spallm_serve.compressor.svd import svd_estimator
from spallm_serve.kernels.packing import SUPPORTED_BITS
from spallm_serve.models import weight_of
from spallm_serve.sketch import Sketch


@dataclass
class BlockResult:
    """What compressing a block gives, by full module name.

    Attributes:
        sketches: codes and tables, on the CPU.
        estimators: SVD factors of the original weights.
        records: one a layer.
        sample: one row of the block's first layer, for the report.
    """

    sketches: dict[str, Sketch]
    estimators: dict[str, tuple[Tensor, Tensor]]
    records: dict[str, LayerRecord]
    sample: TableSample | None = None


def compress_block(
    block: nn.Module,
    prefix: str,
    index: int,
    inputs: BlockInputs,
    planned: dict[str, PlannedLayer],
    settings: CompressSettings,
    on_layer: Callable[[LayerRecord], None],
) -> BlockResult:
    """Compress the planned linears of a block, in the order they run, those with one input at a
    time; each is replaced by what its sketch stands for before the next are looked at.

    Args:
        block: with weights; its linears are overwritten.
        prefix: the block's module name.
        index: its position.
        inputs: what it reads; not advanced.
        planned: layers to compress by full module name; those of other blocks are ignored.
        settings: of the run.
        on_layer: called with each finished layer's record.
    """
    result = BlockResult({}, {}, {})
    for group in group_by_input(block, inputs, index):
        names = [name for name in group.names if f"{prefix}.{name}" in planned]
        if not names:
            continue
        shared = _observe(block, index, inputs, names, settings)
        energies: dict[str, float] = {}
        for name in names if group.follows_norm and settings.estimator_rank else ():
            a, b, energies[name] = svd_estimator(
                weight_of(block.get_submodule(name)), settings.estimator_rank, settings.seed
            )
            result.estimators[f"{prefix}.{name}"] = (a.cpu(), b.cpu())
        for chosen, same in _by_format(names, prefix, planned).items():
            weights = [weight_of(block.get_submodule(name)) for name in same]
            # One tall matrix: rows do not know of each other, and columns are walked once for all.
            tall = sketch_rows(torch.cat(weights), shared, chosen, settings)
            stop = 0
            for name, weight in zip(same, weights, strict=True):
                start, stop = stop, stop + weight.shape[0]
                rows = slice(start, stop)
                sketch = Sketch.from_codes(tall.codes[rows], tall.tables[rows])
                if result.sample is None:
                    result.sample = _sample_row(f"{prefix}.{name}", weight, sketch)
                weight.copy_(sketch.weight())
                full_name = f"{prefix}.{name}"
                result.sketches[full_name] = sketch
                result.records[full_name] = layer_record(
                    full_name, sketch, tall.relative_error(rows), shared.factor, energies.get(name)
                )
                on_layer(result.records[full_name])
    return result


def _sample_row(name: str, weight: Tensor, sketch: Sketch) -> TableSample:
    row = weight.shape[0] // 2
    width = sketch.columns // sketch.tables.shape[1]
    return TableSample(
        layer=name,
        row=row,
        table=[round(float(entry), 6) for entry in sketch.tables[row, 0]],
        weights=[round(float(value), 6) for value in weight[row, :width]],
    )


def install_sketches(block: nn.Module, prefix: str, sketches: dict[str, Sketch]) -> None:
    """Overwrite the linears of a block by what their sketches stand for."""
    for full_name, sketch in sketches.items():
        weight = weight_of(block.get_submodule(full_name.removeprefix(f"{prefix}.")))
        weight.copy_(sketch.weight())


def _observe(
    block: nn.Module,
    index: int,
    inputs: BlockInputs,
    names: list[str],
    settings: CompressSettings,
) -> Curvature:
    weights = [weight_of(block.get_submodule(name)) for name in names]
    accumulator = HessianAccumulator(weights[0].shape[1], weights[0].device)
    for_each_input(block, inputs, index, names[0], accumulator.add)
    hessian = accumulator.finish()
    dead = settle_dead_columns(hessian)
    for weight in weights:
        weight[:, dead] = 0
    return curvature(hessian, settings.damping)


def _by_format(
    names: list[str], prefix: str, planned: dict[str, PlannedLayer]
) -> dict[LayerFormat, list[str]]:
    groups: dict[LayerFormat, list[str]] = {}
    for name in names:
        groups.setdefault(planned[f"{prefix}.{name}"].format, []).append(name)
    return groups


def measure_block(
    block: nn.Module,
    prefix: str,
    index: int,
    inputs: BlockInputs,
    planned: dict[str, PlannedLayer],
    settings: CompressSettings,
) -> dict[str, dict[int, float]]:
    """The relative output error of each planned linear at every number of bits.

    The block is left as it is, and the refit is left out: it takes most of the time and helps all
    numbers of bits about alike.

    Returns:
        module name -> bits -> relative error.
    """
    quick = settings.model_copy(update={"refit": False})
    errors: dict[str, dict[int, float]] = {}
    for group in group_by_input(block, inputs, index):
        names = [name for name in group.names if f"{prefix}.{name}" in planned]
        if not names:
            continue
        shared = _observe(block, index, inputs, names, settings)
        for name in names:
            full_name = f"{prefix}.{name}"
            groups = planned[full_name].format.groups_per_row
            weight = weight_of(block.get_submodule(name))
            for bits in SUPPORTED_BITS:
                chosen = LayerFormat.model_validate({"bits": bits, "groups_per_row": groups})
                sketched = sketch_rows(weight, shared, chosen, quick)
                errors.setdefault(full_name, {})[bits] = sketched.relative_error()
    return errors
