"""One forward pass of a block that stops in front of chosen linears and goes on when told.

Linears have to be compressed in the order they run, each on inputs that the compressed ones before
it made. Running the block anew for each of them costs more than twice the arithmetic; here a micro
batch runs in a greenlet of its own that waits at each stop with its tensors in place. As many wait
as fit into a fixed amount of memory; the rest do run anew, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from spallm_serve.compressor.streaming import BlockInputs
from spallm_serve.models import weight_of

WAITING_BYTES = 40 << 20


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
        waiting_bytes: int = WAITING_BYTES,
    ) -> None:
        self._inputs = inputs
        self._main = getcurrent()
        self._handles = [
            block.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in stops
        ]

        def run(batch: int) -> Tensor:
            return inputs.run(block, index, batch)

        self._run = run
        room = waiting_bytes // _waiting_bytes(block, inputs.hidden[0], stops)
        self._waiting = [self._new_pass() for _ in inputs.hidden[:room]]

    def _new_pass(self) -> greenlet:
        return greenlet(self._run, parent=self._main)

    def __enter__(self) -> BlockWalk:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for waiting in self._waiting:
            waiting.throw()

    def inputs_at(self, stop: str) -> Iterator[Tensor]:
        """What the linear ``stop`` reads, micro batch by micro batch; each then waits there."""
        for batch in range(len(self._inputs.hidden)):
            if batch < len(self._waiting):
                reached, value = _resume(self._waiting[batch], batch)
            else:
                reached, value = self._run_to(stop, batch)
            if reached != stop:
                raise RuntimeError(f"expected to stop at {stop}, stopped at {reached}")
            yield value

    def finish(self) -> None:
        """Run all micro batches to the end of the block and replace its inputs by its outputs."""
        for batch in range(len(self._inputs.hidden)):
            if batch < len(self._waiting):
                output = _resume(self._waiting[batch], batch)
            else:
                _, output = self._run_to(None, batch)
            self._inputs.hidden[batch] = output

    def _run_to(self, stop: str | None, batch: int) -> tuple[str | None, Tensor]:
        """Run a micro batch from the start of the block to a stop, or to its end."""
        fresh = self._new_pass()
        try:
            while True:
                reached = _resume(fresh, batch)
                if fresh.dead:
                    return None, reached
                if reached[0] == stop:
                    return stop, reached[1]
        finally:
            fresh.throw()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._main.switch((name, args[0]))

        return hook


def _resume(waiting: greenlet, batch: int) -> Any:
    """Wake a pass up: a stop's name and what it reads, or the block's output at the end."""
    with torch.no_grad():
        # The first switch hands over the argument, later ones only wake it up.
        return waiting.switch() if waiting else waiting.switch(batch)


def _waiting_bytes(block: nn.Module, hidden: Tensor, stops: list[str]) -> int:
    """What one pass holds at the most: the residual, its norm, the block's input and what the
    widest linear reads."""
    widths = (weight_of(block.get_submodule(name)).shape[1] for name in stops)
    widest = max(widths, default=0)
    return hidden.nbytes // hidden.shape[-1] * (3 * hidden.shape[-1] + widest)
