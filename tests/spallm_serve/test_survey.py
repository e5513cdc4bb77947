"""Counting training data against counting it token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spallm_serve.batches import ExampleStream, collate
from spallm_serve.errors import UserError
from spallm_serve.models import load_tokenizer
from spallm_serve.survey import survey
from spallm_serve.trainer.sparselora.tokens import dense_tokens
from tests.tiny_models import save_tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [
        {"messages": [
            {"role": role, "content": "x" * (turn + length)}
            for turn, role in enumerate(["user", "assistant"] * (1 + length % 3))
        ]}
        for length in range(1, 12)
    ]  # fmt: skip
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("packing", [False, True])
def test_counts(path: Path, packing: bool, tmp_path: Path) -> None:
    stream = ExampleStream(path, load_tokenizer(save_tokenizer(tmp_path)), 64, packing=packing)
    found = survey(stream)
    rows = list(stream)
    batches = [collate([row], 0) for row in rows]
    used = [len(row["input_ids"]) for row in rows]
    assert found.rows == len(rows)
    assert (found.examples, found.truncated) == (stream.seen, stream.truncated)
    assert found.truncated
    assert found.tokens == sum(used)
    assert found.loss_tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    dense = sum(
        int(dense_tokens(batch["labels"])[0, :length].sum())
        for batch, length in zip(batches, used, strict=True)
    )
    assert found.context_tokens == found.tokens - dense
    assert found.context_share == pytest.approx(1 - dense / found.tokens)
    assert f"{stream.seen} examples, {stream.truncated} of them cut" in str(found)


def test_the_last_row_is_looked_at(path: Path, tmp_path: Path) -> None:
    with path.open("a") as file:
        file.write('\n{"prompt": "a"}')
    stream = ExampleStream(path, load_tokenizer(save_tokenizer(tmp_path)), 64)
    with pytest.raises(UserError, match=":12:"):
        survey(stream)
