"""One forward pass of a block that stops in front of chosen linears and goes on when told.

Linears have to be compressed in the order they run, each on inputs that the compressed ones before
it made. Running the block anew for each of them costs more than twice the arithmetic; here a micro
batch runs in a greenlet of its own that waits at each stop with its tensors in place. As many wait
as fit into a given amount of memory; the rest do run anew, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from spallm_serve.compressor.streaming import BlockInputs


@dataclass
class WaitingRoom:
    """Memory for passes that wait, of one walk or of several.

    Attributes:
        capacity: bytes.
        taken: bytes that are held now.
    """

    capacity: int
    taken: int = 0

    def admit(self, size: int) -> bool:
        """Take ``size`` bytes, if they are left."""
        if self.taken + size > self.capacity:
            return False
        self.taken += size
        return True


class BlockWalk:
    """A forward pass of all micro batches through one block, stop by stop.

    Weights may be changed between two stops. Use as a context manager: leaving it removes the hooks
    and ends passes that still wait.

    Args:
        block: the block, with weights.
        inputs: what it reads; replaced by its outputs in :meth:`finish`.
        index: its position.
        stops: linears to stop in front of, in the order they run.
        room: for passes that wait.
    """

    def __init__(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        index: int,
        stops: list[str],
        room: WaitingRoom,
    ) -> None:
        self._inputs = inputs
        self._main = getcurrent()
        self._handles = [
            block.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in stops
        ]

        def run(batch: int) -> Tensor:
            return inputs.run(block, index, batch)

        self._run = run
        self._room = room
        self._shared = set(_storages([inputs.hidden, inputs.calls[index], *block.parameters()]))
        # What a pass holds at each stop, known once one has come there; all are of one size.
        self._held: dict[str, int] = {}
        self._waiting: dict[int, tuple[greenlet, int]] = {}
        self._ended: set[int] = set()

    def __enter__(self) -> BlockWalk:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for batch in list(self._waiting):
            self._take_up(batch).throw()

    def inputs_at(self, stop: str, *, to_the_end: bool = False) -> Iterator[Tensor]:
        """What the linear ``stop`` reads, micro batch by micro batch.

        Args:
            stop: the linear.
            to_the_end: this is the last stop, and no weight will change: each pass runs on and
                leaves its output in the place of the input. Else it waits, if there is room.
        """
        for batch in range(len(self._inputs.hidden)):
            # No name holds on to a tensor that is as large as all that the linear reads.
            yield self._run_to(stop, batch, to_the_end)

    def _run_to(self, stop: str, batch: int, to_the_end: bool) -> Tensor:
        current = self._take_up(batch)
        reached = None
        while reached != stop:
            state = _resume(current, batch)
            if current.dead:
                raise RuntimeError(f"the block ran to its end without a stop at {stop}")
            reached, value = state
        if to_the_end:
            self._end(current, batch)
            return value
        if stop not in self._held:
            self._held[stop] = _held_bytes(current, self._shared)
        held = self._held[stop]
        if self._room.admit(held):
            self._waiting[batch] = current, held
        else:
            current.throw()
        return value

    def finish(self) -> None:
        """Run all micro batches to the end of the block and replace its inputs by its outputs."""
        for batch in range(len(self._inputs.hidden)):
            if batch not in self._ended:
                self._end(self._take_up(batch), batch)

    def _end(self, current: greenlet, batch: int) -> None:
        while not current.dead:
            output = _resume(current, batch)
        self._inputs.hidden[batch] = output
        self._ended.add(batch)

    def _take_up(self, batch: int) -> greenlet:
        """The pass of a micro batch where it waits, or a new one."""
        if batch not in self._waiting:
            return greenlet(self._run, parent=self._main)
        waiting, held = self._waiting.pop(batch)
        self._room.taken -= held
        return waiting

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
