"""One forward pass of a block that stops in front of chosen linears and goes on when told.

Linears have to be compressed in the order they run, each on inputs that the compressed ones before
it made. Running the block anew for each of them costs more than twice the arithmetic; here a micro
batch runs in a greenlet of its own that waits at each stop with its tensors in place. As many wait
as fit into a given amount of memory; the rest do run anew, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from spallm_serve.compressor.streaming import BlockInputs


class BlockWalk:
    """A forward pass of all micro batches through one block, stop by stop.

    Weights may be changed between two stops. Use as a context manager: leaving it removes the hooks
    and ends passes that still wait.

    Args:
        block: the block, with weights.
        inputs: what it reads; replaced by its outputs in :meth:`finish`.
        index: its position.
        stops: linears to stop in front of, in the order they run.
        waiting_bytes: how much passes that wait may hold.
    """

    def __init__(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        index: int,
        stops: list[str],
        waiting_bytes: int,
    ) -> None:
        self._inputs = inputs
        self._main = getcurrent()
        self._handles = [
            block.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in stops
        ]

        def run(batch: int) -> Tensor:
            return inputs.run(block, index, batch)

        self._run = run
        self._waiting_bytes = waiting_bytes
        self._shared = set(_storages([inputs.hidden, inputs.calls[index], *block.parameters()]))
        # How many passes may wait at each stop, known once one has come there.
        self._room: dict[str, int] = {}
        self._waiting: dict[int, greenlet] = {}

    def __enter__(self) -> BlockWalk:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for waiting in self._waiting.values():
            waiting.throw()

    def inputs_at(self, stop: str) -> Iterator[Tensor]:
        """What the linear ``stop`` reads, micro batch by micro batch.

        Each then waits there, if there is room.
        """
        for batch in range(len(self._inputs.hidden)):
            # No name holds on to a tensor that is as large as all that the linear reads.
            yield self._run_to(stop, batch)

    def _run_to(self, stop: str, batch: int) -> Tensor:
        current = self._take_up(batch)
        reached = None
        while reached != stop:
            state = _resume(current, batch)
            if current.dead:
                raise RuntimeError(f"the block ran to its end without a stop at {stop}")
            reached, value = state
        if stop not in self._room:
            held = _held_bytes(current, self._shared)
            self._room[stop] = self._waiting_bytes // max(held, 1)
        if batch < self._room[stop]:
            self._waiting[batch] = current
        else:
            current.throw()
        return value

    def finish(self) -> None:
        """Run all micro batches to the end of the block and replace its inputs by its outputs."""
        for batch in range(len(self._inputs.hidden)):
            current = self._take_up(batch)
            while not current.dead:
                output = _resume(current, batch)
            self._inputs.hidden[batch] = output

    def _take_up(self, batch: int) -> greenlet:
        """The pass of a micro batch where it waits, or a new one."""
        return self._waiting.pop(batch, None) or greenlet(self._run, parent=self._main)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._main.switch((name, args[0]))

        return hook


def _resume(waiting: greenlet, batch: int) -> Any:
    """Wake a pass up: a stop's name and what it reads, or the block's output at the end."""
    with torch.no_grad():
        # The first switch hands over the argument, later ones only wake it up.
        return waiting.switch() if waiting else waiting.switch(batch)


def _held_bytes(waiting: greenlet, shared: set[int]) -> int:
    """Bytes of the tensors that the frames of a waiting pass name, but for those it shares.

    What it will read next is least of it: attention keeps queries, keys and values until it ends.
    """
    held: dict[int, int] = {}
    frame = waiting.gr_frame
    while frame is not None:
        held |= _storages(frame.f_locals)
        frame = frame.f_back
    return sum(size for at, size in held.items() if at not in shared)


def _storages(value: Any) -> dict[int, int]:
    """Address and bytes of each storage of the tensors in nested containers."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return {}
    found: dict[int, int] = {}
    for part in value:
        found |= _storages(part)
    return found
