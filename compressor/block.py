"""Compress one transformer block whose inputs the blocks before it, already compressed, made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spallm_serve.checkpoint import LayerFormat
from spallm_serve.compressor.block_walk import BlockWalk, WaitingRoom
from spallm_serve.compressor.drift import DriftAccumulator
from spallm_serve.compressor.hessian import HessianAccumulator, settle_dead_columns
from spallm_serve.compressor.plan import PlannedLayer
from spallm_serve.compressor.record import LayerRecord, TableSample, layer_record
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.compressor.sketching import (
    Curvature,
    curvature,
    sketch_rows,
)
from spallm_serve.compressor.streaming import BlockInputs, InputGroup, group_by_input
from spallm_serve.heap import return_freed_memory
from spallm_serve.kernels.packing import SUPPORTED_BITS
from spallm_serve.models import dematerialize, weight_of
from spallm_serve.sketch import Sketch
from spallm_serve.svd import svd_estimator

# The drift between the two models' inputs is smooth: so many tokens of the original are enough.
DRIFT_TOKENS = 16384
# For Hessians, and for passes that wait between groups of linears.
# Beside what comes with a model, a run may take 700 MB. The interpreter and its libraries take
# about 470, a chunk of rows and a micro batch at work up to 75; this is left.
WORKING_BYTES = 175_000_000
# Matrices as large as the Hessian that correcting, factoring and rounding need at a time.
_HESSIANS = 5


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


@dataclass(frozen=True)
class BlockPair:
    """A block as it was and as it is being compressed, each with the inputs it has in its model.

    Attributes:
        prefix: the block's module name.
        index: its position.
        block: its linears are overwritten one after another.
        inputs: what it reads behind the compressed blocks.
        original: the untouched block, or None where drift is not corrected; its weights are given
            back as soon as they are not needed.
        original_inputs: what that reads in the original model; the first micro batches are enough.
    """

    prefix: str
    index: int
    block: nn.Module
    inputs: BlockInputs
    original: nn.Module | None = None
    original_inputs: BlockInputs | None = None

    def weight(self, name: str) -> Tensor:
        """The weight of a linear as it is now: a view ``[out, in]``."""
        return weight_of(self.block.get_submodule(name))

    def planned_groups(self, planned: dict[str, PlannedLayer]) -> list[InputGroup]:
        """The linears to compress that read one tensor together, in the order they run."""
        groups = [
            InputGroup(
                [name for name in group.names if f"{self.prefix}.{name}" in planned],
                group.follows_norm,
            )
            for group in group_by_input(self.block, self.inputs, self.index)
        ]
        return [group for group in groups if group.names]


def compress_block(
    pair: BlockPair,
    planned: dict[str, PlannedLayer],
    settings: CompressSettings,
    on_layer: Callable[[LayerRecord], None],
) -> BlockResult:
    """Compress the planned linears of a block, in the order they run, those with one input at a
    time; each is replaced by what its sketch stands for before the next are looked at.

    Args:
        pair: the block; its inputs are replaced by its outputs, those of the original too.
        planned: layers to compress by full module name; those of other blocks are ignored.
        settings: of the run.
        on_layer: called with each finished layer's record.
    """
    result = BlockResult({}, {}, {})

    def use(group: InputGroup, shared: Curvature, targets: dict[str, Tensor]) -> None:
        energies: dict[str, float] = {}
        for name in group.names if group.follows_norm and settings.estimator_rank else ():
            a, b, energies[name] = svd_estimator(
                pair.weight(name).float(), settings.estimator_rank, settings.seed
            )
            result.estimators[f"{pair.prefix}.{name}"] = (a.cpu(), b.cpu())
        for chosen, same in _by_format(group.names, pair.prefix, planned).items():
            # One tall matrix: rows do not know of each other, and columns are walked once for all.
            tall = _stacked(targets, same)
            found = sketch_rows(tall, shared, chosen, settings)
            stop = 0
            for name in same:
                weight = pair.weight(name)
                start, stop = stop, stop + weight.shape[0]
                rows = slice(start, stop)
                sketch = Sketch.from_codes(found.codes[rows], found.tables[rows])
                full_name = f"{pair.prefix}.{name}"
                if result.sample is None:
                    result.sample = _sample_row(full_name, weight, sketch)
                sketch.copy_to(weight)
                result.sketches[full_name] = sketch
                result.records[full_name] = layer_record(
                    full_name, sketch, found.relative_error(rows), shared.factor, energies.get(name)
                )
                on_layer(result.records[full_name])

    _for_each_group(pair, planned, settings, use)
    return result


@torch.no_grad()
def measure_block(
    pair: BlockPair, planned: dict[str, PlannedLayer], settings: CompressSettings
) -> dict[str, dict[int, float]]:
    """What each planned linear costs at every number of bits: how far the block's output moves when
    it alone is compressed, squared, as a share of the output's square, mean over tokens.

    Measured on the first micro batch. A linear's own output says less: where a few tokens have
    massive activations they make up nearly all of it, and hide what the others lose. The block is
    left as it is, and the refit is left out: it takes most of the time and helps all numbers of
    bits about alike.

    Returns:
        module name -> bits -> loss.
    """
    quick = settings.model_copy(update={"refit": False})
    sketches: dict[str, dict[int, Sketch]] = {}

    def use(group: InputGroup, shared: Curvature, targets: dict[str, Tensor]) -> None:
        for name in group.names:
            groups = planned[f"{pair.prefix}.{name}"].format.groups_per_row
            for bits in SUPPORTED_BITS:
                chosen = LayerFormat.model_validate({"bits": bits, "groups_per_row": groups})
                found = sketch_rows(targets[name], shared, chosen, quick)
                sketch = Sketch.from_codes(found.codes, found.tables)
                sketches.setdefault(name, {})[bits] = sketch

    inputs = BlockInputs(pair.inputs.hidden[:1], pair.inputs.calls)
    _for_each_group(pair, planned, settings, use)
    wanted = pair.inputs.hidden[0].float()
    losses: dict[str, dict[int, float]] = {}
    for name, by_bits in sketches.items():
        weight = pair.weight(name)
        kept = weight.clone()
        for bits, sketch in by_bits.items():
            sketch.copy_to(weight)
            moved = inputs.run(pair.block, pair.index, 0).float() - wanted
            share = moved.square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
            losses.setdefault(f"{pair.prefix}.{name}", {})[bits] = float(share.mean())
        weight.copy_(kept)
    return losses


def _for_each_group(
    pair: BlockPair,
    planned: dict[str, PlannedLayer],
    settings: CompressSettings,
    use: Callable[[InputGroup, Curvature, dict[str, Tensor]], None],
) -> None:
    """Walk a block from group to group.

    Args:
        pair, planned, settings: see :func:`compress_block`.
        use: gets a group, its curvature and the weights to aim at; nothing else holds these.
            What it does to a group's weights is seen by the next.
    """
    groups = pair.planned_groups(planned)
    stops = [group.names[0] for group in groups]
    width = max((pair.weight(stop).shape[1] for stop in stops), default=0)
    room = WaitingRoom(max(0, WORKING_BYTES - _HESSIANS * 4 * width**2))

    def begin(block: nn.Module, inputs: BlockInputs) -> BlockWalk:
        return stack.enter_context(BlockWalk(block, inputs, pair.index, stops, room))

    with ExitStack() as stack:
        original = None
        if pair.original is not None and pair.original_inputs is not None:
            original = begin(pair.original, pair.original_inputs)
        walk = begin(pair.block, pair.inputs)
        for group in groups:
            last = group is groups[-1]
            observed = _observe(walk, original, group.names, last, pair, settings)
            if pair.original and last:
                # Now, so that its weights are gone while the last linears are compressed.
                dematerialize(pair.original)
            use(group, *observed)
            del observed  # before the next is made: two Hessians are not held at a time
        walk.finish()
        if original and not groups:
            original.finish()


def _stacked(matrices: dict[str, Tensor], names: list[str]) -> Tensor:
    """Some of the matrices ``[rows, columns]``, taken out of the dict, above each other."""
    if len(names) == 1:
        return matrices.pop(names[0])
    rows = sum(len(matrices[name]) for name in names)
    tall = matrices[names[0]].new_empty(rows, matrices[names[0]].shape[1])
    stop = 0
    for name in names:
        part = matrices.pop(name)  # gone once it is copied: these may be as large as all else
        start, stop = stop, stop + len(part)
        tall[start:stop] = part
    return tall


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
        sketch.copy_to(weight)


def _observe(
    walk: BlockWalk,
    original: BlockWalk | None,
    names: list[str],
    last: bool,
    pair: BlockPair,
    settings: CompressSettings,
) -> tuple[Curvature, dict[str, Tensor]]:
    """The curvature of the inputs that some linears share, and the weights to aim at.

    With the last linears' the original's passes come to their end.
    """
    stored = {name: pair.weight(name) for name in names}
    stop = names[0]
    columns, device = stored[stop].shape[1], stored[stop].device
    return_freed_memory()
    accumulator = HessianAccumulator(columns, device)
    currents = walk.inputs_at(stop)
    if original is not None:
        drift = DriftAccumulator(accumulator, columns, device)
        _add_drift(drift, original.inputs_at(stop, to_the_end=last), currents)
        # Now, while the Hessian is that of the tokens the drift was seen on.
        targets = drift.corrected(stored, settings.damping)
        del drift
    else:
        targets = {name: weight.to(torch.float32, copy=True) for name, weight in stored.items()}
    for current in currents:
        accumulator.add(current)
        del current
    return_freed_memory()
    hessian = accumulator.finish()
    dead = settle_dead_columns(hessian)
    for target in targets.values():
        target[:, dead] = 0
    return curvature(hessian, settings.damping), targets


def _add_drift(
    drift: DriftAccumulator, originals: Iterator[Tensor], currents: Iterator[Tensor]
) -> None:
    """Until the original's micro batches end; no name here outlives the loop."""
    for wanted, current in zip(originals, currents, strict=False):
        drift.add(wanted, current)


def _by_format(
    names: list[str], prefix: str, planned: dict[str, PlannedLayer]
) -> dict[LayerFormat, list[str]]:
    groups: dict[LayerFormat, list[str]] = {}
    for name in names:
        groups.setdefault(planned[f"{prefix}.{name}"].format, []).append(name)
    return groups
