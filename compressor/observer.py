"""Who is told how a run goes on."""

from __future__ import annotations

from typing import Protocol

from spallm_serve.compressor.record import LayerRecord


class Observer(Protocol):
    """All calls come from the run's own thread, in the order things happen."""

    def stage(self, title: str, total: int, unit: str) -> None:
        """A stage of ``total`` steps begins."""

    def step(self, done: int) -> None:
        """``done`` steps of the stage are finished."""

    def layer(self, record: LayerRecord) -> None:
        """A layer was compressed."""

    def refined(self, loss: float) -> None:
        """A refine step had this loss, in nats per token."""

    def resumed(self, blocks: int) -> None:
        """An unfinished run is taken up; so many blocks were done."""


class SilentObserver:
    """Looks away."""

    def stage(self, title: str, total: int, unit: str) -> None:
        """Nothing."""

    def step(self, done: int) -> None:
        """Nothing."""

    def layer(self, record: LayerRecord) -> None:
        """Nothing."""

    def refined(self, loss: float) -> None:
        """Nothing."""

    def resumed(self, blocks: int) -> None:
        """Nothing."""
