"""One forward pass of a block that stops in front of chosen linears and goes on when told.

Linears have to be compressed in the order they run, each on inputs that the compressed ones before
it made. Running the block anew for each of them costs more than twice the arithmetic; here every
micro batch runs once, in a greenlet of its own that waits at each stop with its tensors in place.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """

    def __init__(self, block: nn.Module, inputs: BlockInputs, index: int, stops: list[str]) -> None:
        self._inputs = inputs
        self._stops = stops
        self._main = getcurrent()
        self._handles = [
            block.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in stops
        ]

        def run(batch: int) -> Tensor:
            return inputs.run(block, index, batch)

        self._passes = [greenlet(run, parent=self._main) for _ in inputs.hidden]

    def __enter__(self) -> BlockWalk:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for waiting in self._passes:
            waiting.throw()

    def inputs_at(self, stop: str) -> Iterator[Tensor]:
        """What the linear ``stop`` reads, micro batch by micro batch; each then waits there."""
        for batch in range(len(self._passes)):
            reached, value = self._resume(batch)
            if reached != stop:
                raise RuntimeError(f"expected to stop at {stop}, stopped at {reached}")
            yield value

    def finish(self) -> None:
        """Run all micro batches to the end of the block and replace its inputs by its outputs."""
        for batch in range(len(self._passes)):
            self._inputs.hidden[batch] = self._resume(batch)

    def _resume(self, batch: int) -> Any:
        waiting = self._passes[batch]
        with torch.no_grad():
            # The first switch hands over the argument, later ones only wake it up.
            return waiting.switch() if waiting else waiting.switch(batch)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._main.switch((name, args[0]))

        return hook
