"""Text files to windows of tokens, and what is said about files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from spallm_serve.data import file_windows, read_documents, token_windows
from spallm_serve.errors import UserError
from spallm_serve.models import load_tokenizer
from tests.tiny_models import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path: Path, *lines: object) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_a_text_file_is_one_document(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "a.txt", "One.", "", '{"text": "two"}')
    assert read_documents(path, tokenizer) == ['One.\n\n{"text": "two"}\n']


def test_lines_of_jsonl_are_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write(
        tmp_path / "a.jsonl", {"text": "one", "id": 3}, "  ", {"content": "two\nlines"},
        {"messages": chat},
    )  # fmt: skip
    expected = ["one", "two\nlines", "[user] hi\n[assistant] ho\n"]
    assert read_documents(path, tokenizer) == expected


def test_only_line_feeds_end_a_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """JSON may hold U+2028 and U+0085 unescaped."""
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    assert read_documents(write(tmp_path / "a.jsonl", *lines), tokenizer) == texts


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["", '{"text": "fine"}', '{"text": '], r"a\.jsonl:3: not JSON"),
        (['{"text": "fine"}', '{"title": "x"}'], r"a\.jsonl:2: expected"),
        (['{"text": 3}'], r"a\.jsonl:1: expected"),
        (['"text"'], r"a\.jsonl:1: expected"),
        (['{"messages": "hello"}'], r"a\.jsonl:1: expected"),
        (['{"messages": ["hello"]}'], r"a\.jsonl:1: "),
        (['{"messages": [{"role": "user"}]}'], r"a\.jsonl:1: "),
    ],
)
def test_lines_that_are_no_documents(
    lines: list[str], message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_documents(write(tmp_path / "a.jsonl", *lines), tokenizer)
    assert "\n" not in str(caught.value)


def test_chat_for_a_tokenizer_without_template(tmp_path: Path) -> None:
    plain = load_tokenizer(save_tokenizer(tmp_path / "plain", chat_template=None))
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*template"):
        read_documents(path, plain)


def test_files_that_cannot_be_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_documents(path, tokenizer)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such file" in refused(tmp_path / "absent.txt")
    for name in ("a.txt", "a.jsonl"):
        assert "empty" in refused(write(tmp_path / name, "", "  "))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "UTF-8" in refused(tmp_path / "latin.txt")
    assert "cannot be read" in refused(tmp_path)


@given(
    documents=st.lists(st.text(alphabet="abc d", max_size=12), max_size=8),
    seqlen=st.integers(1, 9),
    limit=st.none() | st.integers(1, 5),
)
def test_windows_are_the_joined_documents(
    documents: list[str], seqlen: int, limit: int | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids: list[int] = []
    for document in documents:
        ids += ([tokenizer.eos_token_id] if ids else []) + [
            tokenizer.convert_tokens_to_ids(character) for character in document
        ]
    windows = token_windows(documents, tokenizer, seqlen, limit)
    assert windows.dtype == torch.int64
    count = len(ids) // seqlen if limit is None else min(limit, len(ids) // seqlen)
    assert windows.shape == (count, seqlen)
    assert windows.flatten().tolist() == ids[: count * seqlen]


def test_no_more_is_read_than_the_limit_takes(tokenizer: PreTrainedTokenizerBase) -> None:
    read: list[int] = []

    def documents():  # type: ignore[no-untyped-def]
        for number in range(100):
            read.append(number)
            yield "abcdefg"

    assert token_windows(documents(), tokenizer, 4, 3).shape == (3, 4)
    assert len(read) == 2


def test_windows_of_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "defg"})
    windows = file_windows(path, tokenizer, 3)
    assert [tokenizer.decode(window) for window in windows] == ["abc", "</s>de"]
    assert torch.equal(file_windows(path, tokenizer, 3, 1), windows[:1])
    with pytest.raises(UserError, match=r"a\.jsonl.*9 tokens"):
        file_windows(path, tokenizer, 9)
