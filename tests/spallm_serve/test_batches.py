"""Streams of rows, packing, batches, and which models keep packed examples apart."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from spallm_serve.batches import (
    ExampleStream,
    Row,
    collate,
    packed,
    shuffled,
    supports_packing,
)
from spallm_serve.errors import UserError
from spallm_serve.examples import IGNORED, Example, stream_examples
from spallm_serve.models import load_tokenizer
from tests.tiny_models import CONFIGS, save_tiny, save_tokenizer

PACKING = ("llama", "qwen3", "gemma3", "mistral", "phi", "gpt2")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=None)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 examples of 4 to 13 tokens: digits, one output and the end."""
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    rows = [{"prompt": "x" * (number % 10) + f"{number:02}", "completion": "y"}
            for number in range(40)]  # fmt: skip
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    return path


def example(*ids: int) -> Example:
    return Example(ids, ids)


def examples_of(lengths: list[int]) -> list[Example]:
    """All of different tokens, so that each is to be told from the others."""
    first = 0
    found = []
    for length in lengths:
        found.append(example(*range(first, first + length)))
        first += length
    return found


def split(row: Row) -> list[tuple[int, ...]]:
    """The token ids of each example of a row."""
    borders = [at for at, position in enumerate(row["position_ids"]) if position == 0]
    stops = [*borders[1:], len(row["input_ids"])]
    return [tuple(row["input_ids"][a:b]) for a, b in zip(borders, stops, strict=True)]


def test_rows_in_order(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = list(ExampleStream(path, tokenizer, 20))
    examples = list(stream_examples(path, tokenizer, 20))
    assert len(rows) == 40
    for row, source in zip(rows, examples, strict=True):
        assert row["input_ids"] == list(source.input_ids)
        assert row["labels"] == list(source.labels)
        assert row["position_ids"] == list(range(len(source.input_ids)))


def test_the_order_is_of_the_seed_and_the_epoch(
    path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        stream = ExampleStream(path, tokenizer, 20, seed=seed, shuffle_buffer=10)
        stream.set_epoch(epoch)
        first = [tuple(row["input_ids"]) for row in stream]
        assert [tuple(row["input_ids"]) for row in stream] == first
        return first

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert orders[0] == order(0, 0)
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(each) == sorted(orders[0]) for each in orders)


@settings(deadline=None)
@given(count=st.integers(0, 60), size=st.integers(1, 70), seed=st.integers(0, 9))
def test_a_shuffle_holds_no_more_than_its_buffer(count: int, size: int, seed: int) -> None:
    read: list[int] = []

    def source():  # type: ignore[no-untyped-def]
        for number in range(count):
            read.append(number)
            yield example(number)

    found = []
    for each in shuffled(source(), size, random.Random(seed)):
        found.append(each.input_ids[0])
        assert len(read) - len(found) <= size
    assert sorted(found) == list(range(count))


def test_every_place_of_a_shuffle_is_as_likely() -> None:
    first = Counter(
        next(shuffled(examples_of([1] * 4), 4, random.Random(seed))).input_ids[0]
        for seed in range(400)
    )
    assert set(first) == {0, 1, 2, 3}
    assert min(first.values()) > 60


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 10), max_size=40),
    open_rows=st.integers(1, 5),
)
def test_packing_loses_nothing(lengths: list[int], open_rows: int) -> None:
    examples = examples_of(lengths)
    rows = list(packed(examples, 10, open_rows))
    assert sorted((each for row in rows for each in row), key=lambda e: e.input_ids) == examples
    for row in rows:
        assert 0 < sum(len(each.input_ids) for each in row) <= 10
    if open_rows * 10 >= sum(lengths):
        # First fit with every row open: no two rows would go into one.
        filled = sorted(sum(len(each.input_ids) for each in row) for row in rows)
        assert len(filled) < 2 or filled[0] + filled[1] > 10


def test_packing_reads_no_further_than_its_open_rows() -> None:
    read: list[int] = []

    def source():  # type: ignore[no-untyped-def]
        for number in range(100):
            read.append(number)
            yield example(*range(6))

    assert len(next(packed(source(), 10, 3))) == 1
    assert len(read) == 4


def test_packed_rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = ExampleStream(path, tokenizer, 20, packing=True, shuffle_buffer=7, seed=3)
    rows = list(stream)
    sources = {each.input_ids: each for each in stream_examples(path, tokenizer, 20)}
    assert len(rows) < 20
    assert sorted(ids for row in rows for ids in split(row)) == sorted(sources)
    for row in rows:
        assert len(row["input_ids"]) <= 20
        labels = []
        for ids in split(row):
            labels += [IGNORED, *sources[ids].labels[1:]]
        assert row["labels"] == labels


def test_a_stream_counts_what_it_read(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = ExampleStream(path, tokenizer, 8, packing=True)
    list(stream)
    # A prompt of 2 to 11 tokens, an output and the end.
    assert (stream.seen, stream.truncated) == (40, 40 * 5 // 10)
    list(stream)
    assert (stream.seen, stream.truncated) == (40, 20)


def test_strict_streams(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="over the limit of 8"):
        list(ExampleStream(path, tokenizer, 8, strict=True))


def test_workers(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = ExampleStream(path, tokenizer, 20)

    def rows(workers: int) -> int:
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        return sum(1 for _ in loader)

    assert rows(0) == rows(1) == 40
    with pytest.raises(ValueError, match="at most one worker"):
        rows(2)


def row(*lengths: int, label: int = 5) -> Row:
    """Tokens 5; all of them outputs but the first of each example."""
    made = Row(input_ids=[], labels=[], position_ids=[])
    for length in lengths:
        made["input_ids"] += [5] * length
        made["labels"] += [IGNORED, *[label] * (length - 1)]
        made["position_ids"] += range(length)
    return made


def test_a_padded_batch() -> None:
    short = Row(input_ids=[3, 4, 5], labels=[3, IGNORED, 5], position_ids=[0, 1, 2])
    batch = collate([short, row(9)], pad_token_id=5)
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    assert all(each.dtype == torch.int64 and each.shape == (2, 16) for each in batch.values())
    assert batch["input_ids"][0].tolist() == [3, 4, 5, *[5] * 13]
    # By position: the last token of the row is the padding's token and stays an output.
    assert batch["labels"][0].tolist() == [IGNORED, IGNORED, 5, *[IGNORED] * 13]
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["attention_mask"][0, :3].all()


def test_a_packed_batch() -> None:
    batch = collate([row(3, 2), row(8)], pad_token_id=0)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert all(each.dtype == torch.int64 and each.shape == (2, 8) for each in batch.values())
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [*range(8)]]
    assert batch["labels"][0].tolist() == [IGNORED, 5, 5, IGNORED, 5, *[IGNORED] * 3]


def test_a_batch_that_teaches_nothing() -> None:
    with pytest.raises(UserError, match="without a single output"):
        collate([row(3, label=IGNORED), row(1)], pad_token_id=0)
    assert collate([row(3, label=IGNORED), row(2)], pad_token_id=0)["labels"].max() == 5


def tiny(name: str, directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(save_tiny(name, directory), dtype=torch.float32)


def logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", PACKING)
def test_packed_examples_are_as_alone(name: str, tmp_path: Path) -> None:
    model = tiny(name, tmp_path)
    generator = torch.Generator().manual_seed(0)
    lengths = [[11, 13, 5], [1, 12], [30]]
    examples = [
        [example(*torch.randint(3, 131, (length,), generator=generator).tolist()) for length in row]
        for row in lengths
    ]
    items = []
    for group in examples:
        items.append(row(*(len(each.input_ids) for each in group)))
        items[-1]["input_ids"] = [token for each in group for token in each.input_ids]
    batch = collate(items, pad_token_id=0)
    labels = batch.pop("labels")
    together = logits(model, **batch)
    alone = torch.cat(
        [logits(model, input_ids=torch.tensor([each.input_ids]))[0] for group in examples
         for each in group]
    )  # fmt: skip
    packed_logits = torch.cat([together[at, : sum(row)] for at, row in enumerate(lengths)])
    torch.testing.assert_close(packed_logits, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    assert labels.shape == together.shape[:2]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_models_support_packing(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(name, tmp_path).to(dtype).train()
    # OPT makes its mask without looking at the positions.
    assert supports_packing(model) == (name != "opt")
    assert all(module.training for module in model.modules())


def test_a_model_without_positions(tmp_path: Path) -> None:
    class NoPositions(nn.Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return self.model(input_ids, use_cache=use_cache)

    assert not supports_packing(NoPositions(tiny("llama", tmp_path)))  # type: ignore[arg-type]
