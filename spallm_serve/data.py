"""Text files to windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spallm_serve.errors import UserError

# A line of a .jsonl file holds one of these: plain text, or a chat for the model's template.
_TEXT_FIELDS = ("text", "content")
_CHAT_FIELD = "messages"


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents of a text file: all of a ``.txt`` is one, each line of a ``.jsonl`` is one.

    Args:
        path: UTF-8 text; a line of a ``.jsonl`` has ``text`` or ``messages``.
        tokenizer: turns ``messages`` into text with its chat template.

    Raises:
        UserError: no such file, not UTF-8, an empty file, or a line that is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise UserError(f"{path}: is empty")
    if path.suffix != ".jsonl":
        return [text]
    return [
        _document(line, f"{path}:{number}", tokenizer)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _document(line: str, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if isinstance(entry, dict):
        for field in _TEXT_FIELDS:
            if isinstance(entry.get(field), str):
                return str(entry[field])
        if isinstance(entry.get(_CHAT_FIELD), list):
            return _chat(entry[_CHAT_FIELD], where, tokenizer)
    raise UserError(f'{where}: expected {{"text": "..."}} or {{"messages": [...]}}')


def _chat(messages: list[Any], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the model's tokenizer has no chat template for messages")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'{where}: expected messages of {{"role": "...", "content": "..."}}')
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (ValueError, TemplateError) as error:
        raise UserError(f"{where}: refused by the chat template ({error})") from error


def token_windows(
    documents: Iterator[str] | list[str],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    limit: int | None = None,
) -> Tensor:
    """Consecutive windows of ``seqlen`` tokens, documents joined by the end-of-text token.

    Args:
        documents: texts; only as many are read as ``limit`` windows take.
        tokenizer: the model's.
        seqlen: tokens in a window.
        limit: how many windows at most.

    Returns:
        int64 ``[windows, seqlen]``; an incomplete last window is left out, so there may be none.
    """
    ids: list[int] = []
    for document in documents:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if limit is not None and len(ids) >= limit * seqlen:
            break
    windows = len(ids) // seqlen
    if limit is not None:
        windows = min(windows, limit)
    return torch.tensor(ids[: windows * seqlen], dtype=torch.int64).view(windows, seqlen)


def file_windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, seqlen: int, limit: int | None = None
) -> Tensor:
    """Windows of a text file (see :func:`read_documents` and :func:`token_windows`).

    Raises:
        UserError: unreadable, or shorter than one window.
    """
    windows = token_windows(read_documents(path, tokenizer), tokenizer, seqlen, limit)
    if windows.shape[0] == 0:
        raise UserError(f"{path}: is shorter than one window of {seqlen} tokens")
    return windows
