"""Batches of training examples: shuffled, packed several to a row, and padded."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spallm_serve.errors import UserError
from spallm_serve.examples import IGNORED, Example, stream_examples

# Tensor cores want lengths of whole multiples.
_LENGTH_MULTIPLE = 8
_OPEN_ROWS = 64


class Row(TypedDict):
    """One row of a batch: an example, or several end to end.

    ``position_ids`` begin anew with each example, whose first label is :data:`IGNORED`: nothing of
    its own comes before it that it could be predicted from.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]


class ExampleStream(IterableDataset[Row]):
    """The rows of a file, in an order that only the seed and the epoch decide.

    The order is that of a buffer shuffle: each example is drawn from the ``shuffle_buffer`` ones
    that the file holds next, so that one near the end never comes near the beginning. A file that
    is sorted wants a buffer of its length, or shuffling beforehand.

    It gives all rows to everyone who iterates: sharing them out among processes is up to
    accelerate, and more than one worker is refused, as each would bring every row.

    Args:
        path, tokenizer, max_length, strict: see :func:`~spallm_serve.examples.stream_examples`.
        seed: of the shuffle.
        shuffle_buffer: examples held at a time; 0 keeps the file's order.
        packing: several examples to a row of at most ``max_length`` tokens, first fit.

    Attributes:
        seen, truncated: examples read in the latest pass, and those of them that were cut. A
            worker process counts its own copy.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        strict: bool = False,
        seed: int = 0,
        shuffle_buffer: int = 0,
        packing: bool = False,
    ) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.strict = strict
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.packing = packing
        self.epoch = 0
        self.seen = 0
        self.truncated = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError("an ExampleStream takes at most one worker")
        examples = self._examples()
        if self.shuffle_buffer:
            generator = random.Random(f"{self.seed} {self.epoch}")
            examples = shuffled(examples, self.shuffle_buffer, generator)
        rows = packed(examples, self.max_length) if self.packing else ([each] for each in examples)
        return map(_row, rows)

    def _examples(self) -> Iterator[Example]:
        self.seen = self.truncated = 0
        for example in stream_examples(
            self.path, self.tokenizer, self.max_length, strict=self.strict
        ):
            self.seen += 1
            self.truncated += example.truncated > 0
            yield example


class EndlessStream(IterableDataset[Row]):
    """The passes over a stream one after another, each in its own order; it never ends."""

    def __init__(self, stream: ExampleStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Row]:
        for epoch in count():
            self.stream.set_epoch(epoch)
            yield from self.stream


def shuffled(
    examples: Iterable[Example], buffer_size: int, generator: random.Random
) -> Iterator[Example]:
    """The examples in another order, holding at most ``buffer_size`` of them."""
    buffer: list[Example] = []
    for example in examples:
        if len(buffer) < buffer_size:
            buffer.append(example)
            continue
        place = generator.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = example
    generator.shuffle(buffer)
    yield from buffer


def packed(
    examples: Iterable[Example], max_length: int, open_rows: int = _OPEN_ROWS
) -> Iterator[list[Example]]:
    """Rows of at most ``max_length`` tokens: each example in the first open row with room for it.

    Args:
        examples: none longer than ``max_length``.
        max_length: tokens in a row.
        open_rows: where all of so many are too full, the fullest is given out.
    """
    rows: list[list[Example]] = []
    rooms: list[int] = []
    for example in examples:
        length = len(example.input_ids)
        place = next((at for at, room in enumerate(rooms) if room >= length), None)
        if place is None:
            if len(rows) == open_rows:
                fullest = rooms.index(min(rooms))
                del rooms[fullest]
                yield rows.pop(fullest)
            place = len(rows)
            rows.append([])
            rooms.append(max_length)
        rows[place].append(example)
        rooms[place] -= length
    yield from rows


def _row(examples: list[Example]) -> Row:
    row = Row(input_ids=[], labels=[], position_ids=[])
    for example in examples:
        row["input_ids"] += example.input_ids
        row["labels"] += (IGNORED, *example.labels[1:])
        row["position_ids"] += range(len(example.input_ids))
    return row


def collate(items: list[Row], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of rows, padded on the right to a common multiple of 8 tokens.

    Packed rows are told apart by their positions, which transformers takes for a block-diagonal
    mask if there is no attention mask **and the model is called with** ``use_cache=False``.
    Padding is then one more example of its row. A batch without packed rows has a mask instead.

    Args:
        items: rows, of any lengths.
        pad_token_id: any token; the labels do not depend on it.

    Returns:
        int64 ``[rows, tokens]``: ``input_ids``, ``labels`` and either ``attention_mask`` or
        ``position_ids``.

    Raises:
        UserError: no label in all the batch, so that it would teach nothing.
    """
    longest = max(len(item["input_ids"]) for item in items)
    length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    batch = {
        "input_ids": _pad([item["input_ids"] for item in items], length, pad_token_id),
        "labels": _pad([item["labels"] for item in items], length, IGNORED),
    }
    batch["labels"][:, 0] = IGNORED
    if (batch["labels"] == IGNORED).all():
        raise UserError("a batch without a single output token: there is nothing to learn from it")
    lengths = [len(item["input_ids"]) for item in items]
    if any(0 in item["position_ids"][1:] for item in items):
        batch["position_ids"] = torch.tensor(
            [
                [*item["position_ids"], *range(length - used)]
                for item, used in zip(items, lengths, strict=True)
            ]
        )
    else:
        batch["attention_mask"] = _pad([[1] * used for used in lengths], length, 0)
    return batch


def _pad(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


@torch.no_grad()
def supports_packing(model: PreTrainedModel) -> bool:
    """Whether a causal LM keeps packed examples apart, found out by running it.

    Four random examples are packed into two rows; their logits are those of each alone, up to the
    square root of the logits' precision, or the model does not support packing.
    """
    # Some models have no parameter, others no buffer.
    device = next(chain(model.parameters(), model.buffers())).device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    examples = torch.randint(vocabulary, (4, _LENGTH_MULTIPLE), generator=generator).to(device)
    positions = torch.arange(_LENGTH_MULTIPLE, device=device).repeat(2, 2)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        alone = model(input_ids=examples, use_cache=False).logits
        together = model(
            input_ids=examples.view(2, -1), position_ids=positions, use_cache=False
        ).logits
    except TypeError:
        # Takes no positions.
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    tolerance = torch.finfo(alone.dtype).eps ** 0.5 * float(alone.abs().max())
    return torch.allclose(together.view_as(alone), alone, rtol=0, atol=tolerance)
