"""What a method of fine-tuning is to the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.adapter import Adapter

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class WarmUp:
    """Batches to look at before training, for methods that choose what to train by gradients.

    Attributes:
        batches: as many as the method asked for.
        loss: the training loss of a batch, differentiable in whatever of the model asks for a
            gradient; a sum over its loss tokens divided by their number.
    """

    batches: Iterator[Batch]
    loss: Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Savings:
    """What a method saves over LoRA on the same data, as far as it can be known beforehand.

    Attributes:
        flops: predicted share of a LoRA step's floating point operations.
        why: one line for the person at the terminal.
    """

    flops: float
    why: str


class Method(ABC):
    """A method of fine-tuning: puts trainable parts into a frozen model and takes them out again.

    The loop calls :meth:`select` (once in a run; what it chose is saved, and given back on resume),
    then :meth:`prepare`, then for every micro batch :meth:`on_batch`, and at the end
    :meth:`adapter`.
    """

    name: ClassVar[str]
    warm_up_batches: int = 0

    def select(self, model: PreTrainedModel, warm_up: WarmUp) -> dict[str, Tensor]:
        """Choose what to train; the model has to be as it was afterwards.

        Args:
            model: frozen; not yet prepared.
            warm_up: batches and their loss.

        Returns:
            The choice, as tensors by name; :meth:`prepare` gets them back.
        """
        return {}

    @abstractmethod
    def prepare(
        self, model: PreTrainedModel, selection: dict[str, Tensor]
    ) -> dict[str, nn.Parameter]:
        """Put the trainable parts in their place; they change nothing yet.

        Args:
            model: all its parameters are frozen.
            selection: what :meth:`select` returned.

        Returns:
            The float32 parameters to train, by name.

        Raises:
            UserError: the model has nothing this method can train.
        """

    def on_batch(self, batch: Batch, share_done: float) -> None:  # noqa: B027 (few need it)
        """Called before the forward pass of each micro batch.

        Args:
            batch: ``input_ids``, ``labels`` (-100: no loss) and ``attention_mask`` (padded) or
                ``position_ids`` (packed), all int64 ``[rows, tokens]``.
            share_done: of the optimizer steps, 0 to 1.
        """

    @abstractmethod
    def added_flops(self, batch: Batch) -> int:
        """Operations of a step beside those of the frozen model, forward and backward, by formula.

        Negative where a method leaves more out than it adds.

        Args:
            batch: see :meth:`on_batch`.
        """

    @abstractmethod
    def adapter(self, base_digest: str, base_name: str) -> Adapter:
        """What was trained so far, in the dtypes of an adapter file."""
