"""Run a model block by block: the calibration tokens wait in front of one block at a time.

Everything is done with forward calls that any architecture makes anyway. What a block is called
with (masks, rotary embeddings, ...) is recorded from the model's own forward pass; which linears
belong together is seen from who shares an input. No architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.errors import UserError
from spallm_serve.models import decoder_blocks, is_norm, linears

# Few: activations larger than 2 MiB would be mapped anew, page by page, for every operation.
MICRO_BATCH_TOKENS = 512
# An MLP holds four activations of its inner width at a time; of a wide model, fewer tokens run.
_MICRO_BATCH_VALUES = 4 << 20


class _Stop(Exception):  # noqa: N818 (not an error)
    """Ends a forward pass once what it was run for has been seen."""


@dataclass
class BlockInputs:
    """The calibration tokens in front of a block.

    Attributes:
        hidden: ``[batch, seqlen, width]`` a micro batch; replaced block by block.
        calls: for each block the positional and keyword arguments beside the hidden states.
        returns_tuple: whether the blocks of this architecture return a tuple.
        groups: what :func:`group_by_input` saw of blocks made of certain modules.
    """

    hidden: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    returns_tuple: bool = False
    groups: dict[tuple[tuple[str, type], ...], list[InputGroup]] = field(default_factory=dict)

    def run(self, block: nn.Module, index: int, batch: int) -> Tensor:
        """The output of block ``index`` for one micro batch."""
        args, kwargs = self.calls[index]
        output = block(self.hidden[batch], *args, **kwargs)
        if isinstance(output, tuple):
            self.returns_tuple = True
            return output[0]
        return output

    def head(self, batches: int) -> BlockInputs:
        """The first micro batches, to be advanced through other blocks."""
        return BlockInputs(self.hidden[:batches], self.calls, self.returns_tuple)

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace every micro batch by the block's output."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(block, index, batch)


def micro_batch_tokens(widest: int) -> int:
    """How many tokens run through a block at a time whose widest linear has ``widest`` columns."""
    return min(MICRO_BATCH_TOKENS, _MICRO_BATCH_VALUES // widest)


def micro_batches(tokens: Tensor, widest: int) -> list[Tensor]:
    """Split ``[samples, seqlen]`` into micro batches of one size.

    One size for all, because masks recorded for one batch are used for every other: about
    :func:`micro_batch_tokens`, but at least a sample.
    """
    samples, seqlen = tokens.shape
    size = max(1, min(samples, micro_batch_tokens(widest) // seqlen))
    while samples % size:
        size -= 1
    return list(tokens.split(size))


@torch.no_grad()
def capture_block_inputs(
    model: PreTrainedModel, batches: list[Tensor], dtype: torch.dtype
) -> BlockInputs:
    """Run the part of the model before its blocks; record how each block is called.

    Args:
        model: only the modules outside the blocks need memory.
        batches: token ids, int64 ``[batch, seqlen]`` each.
        dtype: what the blocks compute in.

    Raises:
        UserError: the model does not call its blocks one after another on hidden states.
    """
    _, blocks = decoder_blocks(model)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[Tensor] = []

    def record(position: int) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if position == 0:
                first.append(hidden)
            calls.append((args, kwargs))
            if position == len(blocks) - 1:
                raise _Stop
            return hidden

        return forward

    hidden: list[Tensor] = []
    recorded = calls
    with _replaced_forwards(blocks, record), _embeddings_in(model, dtype):
        for batch in batches:
            calls.clear()
            first.clear()
            with suppress(_Stop):
                model(input_ids=batch, use_cache=False)
            if len(calls) != len(blocks) or len(first) != 1:
                raise UserError(
                    f"{type(model).__name__}: expected each of {len(blocks)} blocks to be called "
                    f"once, saw {len(calls)} calls; this architecture is not supported"
                )
            hidden.append(first[0])
            recorded = list(calls)
    return BlockInputs(hidden, recorded)


@torch.no_grad()
def for_each_head_input(
    model: PreTrainedModel,
    inputs: BlockInputs,
    batches: list[Tensor],
    use: Callable[[Tensor], None],
) -> None:
    """Give ``use`` what the output head reads, in every micro batch.

    Args:
        model: only the modules outside the blocks, without the head, need memory.
        inputs: the states behind the last block.
        batches: the token ids they came from.
        use: called with float ``[batch, seqlen, width]``.
    """
    _, blocks = decoder_blocks(model)
    states: list[Tensor] = []

    def pass_on(position: int) -> Callable[..., Any]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            passed = states[0] if position == 0 else hidden
            return (passed,) if inputs.returns_tuple else passed

        return forward

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        use(args[0])
        raise _Stop

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        with _replaced_forwards(blocks, pass_on), _embeddings_in(model, inputs.hidden[0].dtype):
            for hidden, batch in zip(inputs.hidden, batches, strict=True):
                states[:] = [hidden]
                with suppress(_Stop):
                    model(input_ids=batch, use_cache=False)
    finally:
        handle.remove()


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one tensor together.

    Attributes:
        names: inside the block, in the order they run.
        follows_norm: whether that tensor is what a normalisation gave. So it is for q, k, v, gate
            and up, and not for o and down.
    """

    names: list[str]
    follows_norm: bool


def group_by_input(block: nn.Module, inputs: BlockInputs, index: int) -> list[InputGroup]:
    """The linears of a block in the order they run, those that read one tensor together.

    For a Llama block: [q, k, v], [o], [gate, up], [down]. Seen from a run with one micro batch,
    once for all blocks made of the same modules.
    """
    made_of = tuple((name, type(module)) for name, module in block.named_modules())
    if made_of not in inputs.groups:
        inputs.groups[made_of] = _observed_groups(block, inputs, index)
    return inputs.groups[made_of]


@torch.no_grad()
def _observed_groups(block: nn.Module, inputs: BlockInputs, index: int) -> list[InputGroup]:
    groups: list[tuple[Tensor, list[str]]] = []
    normalised: list[Tensor] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for seen, names in groups:
                if _same_tensor(seen, args[0]):
                    names.append(name)
                    return
            groups.append((args[0], [name]))

        return hook

    def note_norm(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        normalised.append(output)

    handles = [
        module.register_forward_pre_hook(note(name)) for name, module in linears(block).items()
    ]
    handles += [
        module.register_forward_hook(note_norm) for module in block.modules() if is_norm(module)
    ]
    try:
        inputs.run(block, index, 0)
    finally:
        for handle in handles:
            handle.remove()
    return [
        InputGroup(names, any(_same_tensor(tensor, norm) for norm in normalised))
        for tensor, names in groups
    ]


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """One tensor or two views of it (OPT flattens its input before the first MLP layer)."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel())


@contextmanager
def _replaced_forwards(
    blocks: nn.ModuleList, make: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    for position, block in enumerate(blocks):
        block.forward = make(position)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def _embeddings_in(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Embeddings stay in the dtype they are stored in and give what all else computes in."""
    handles = [
        module.register_forward_hook(lambda module, args, output: output.to(dtype))
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
