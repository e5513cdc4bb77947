"""The Hessians of the inputs that the linears of a compressed base read, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.checkpoint import CODES, TABLES
from spallm_serve.compressor.block import WORKING_BYTES
from spallm_serve.compressor.block_walk import BlockWalk, WaitingRoom
from spallm_serve.compressor.hessian import HessianAccumulator
from spallm_serve.compressor.streaming import (
    BlockInputs,
    capture_block_inputs,
    for_each_head_input,
    group_by_input,
    micro_batches,
)
from spallm_serve.models import (
    ModelSource,
    decoder_blocks,
    dematerialize,
    linears,
    materialize,
    weight_of,
)
from spallm_serve.sketch import Sketch

Use = Callable[[str, nn.Module, Tensor], None]
_CPU = torch.device("cpu")


@torch.no_grad()
def for_each_hessian(
    source: ModelSource,
    model: PreTrainedModel,
    modules: Collection[str],
    tokens: Tensor,
    use: Use,
) -> None:
    """Run the base block by block on calibration tokens.

    Args:
        source: the compressed base.
        model: its dense skeleton; no more than a block of it has memory at a time.
        modules: the compressed linears that are asked for, by name in the model.
        tokens: int64 ``[samples, seqlen]``.
        use: called with each module's name, the linear, and float32 ``[in, in]``, which linears
            that read one tensor share.

    Raises:
        UserError: the model does not call its blocks one after another, or is damaged.
    """
    prefix, blocks = decoder_blocks(model)
    widest = max(weight_of(linear).shape[1] for linear in linears(blocks).values())
    batches = micro_batches(tokens, widest)
    _bring_in_outside(model, source)
    inputs = capture_block_inputs(model, batches, torch.float32)
    dematerialize(model)
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        _bring_in(block, name, source)
        _walk_block(block, name, inputs, index, modules, use)
        dematerialize(block)
    outside = [module for module in modules if not module.startswith(f"{prefix}.")]
    for module in outside:  # the head: nothing else out there is compressed to a linear
        _bring_in_outside(model, source)
        accumulator = HessianAccumulator(weight_of(model.get_submodule(module)).shape[1])
        for_each_head_input(model, inputs, batches, accumulator.add)
        use(module, model.get_submodule(module), accumulator.finish())


def _walk_block(
    block: nn.Module,
    name: str,
    inputs: BlockInputs,
    index: int,
    modules: Collection[str],
    use: Use,
) -> None:
    groups = [
        [linear for linear in group.names if f"{name}.{linear}" in modules]
        for group in group_by_input(block, inputs, index)
    ]
    groups = [group for group in groups if group]
    room = WaitingRoom(WORKING_BYTES)
    with BlockWalk(block, inputs, index, [group[0] for group in groups], room) as walk:
        for group in groups:
            linear = block.get_submodule(group[0])
            accumulator = HessianAccumulator(weight_of(linear).shape[1])
            for current in walk.inputs_at(group[0], to_the_end=group is groups[-1]):
                accumulator.add(current)
            hessian = accumulator.finish()
            for each in group:
                use(f"{name}.{each}", block.get_submodule(each), hessian)
        walk.finish()


def _bring_in(module: nn.Module, name: str, source: ModelSource) -> None:
    """Give part of a dense skeleton its weights, compressed ones looked up, all float32."""
    sketched = {
        full_name: part
        for full_name, part in module.named_modules(prefix=name)
        if full_name + CODES in source.reader
    }
    skip = {f"{full_name}.weight" for full_name in sketched}
    materialize(module, name, source, _CPU, torch.float32, skip)
    for full_name, part in sketched.items():
        assert isinstance(part.weight, Tensor)
        part.weight = nn.Parameter(torch.empty(part.weight.shape), requires_grad=False)
        weight = weight_of(part)
        read_sketch(source, full_name, weight.shape[1]).copy_to(weight)


def _bring_in_outside(model: PreTrainedModel, source: ModelSource) -> None:
    """What lies outside the blocks, without the output head."""
    prefix, _ = decoder_blocks(model)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head or name.startswith(f"{prefix}.") or list(module.children()):
            continue
        _bring_in(module, name, source)


def read_sketch(source: ModelSource, module: str, columns: int) -> Sketch:
    """The sketch of a compressed layer on disk; ``columns`` is the width of its input."""
    return Sketch(source.reader.read(module + CODES), source.reader.read(module + TABLES), columns)
