"""Rows of training data: read from a file one by one, their formats found by their fields.

A row is an object in one of these formats (a null counts as absent):

- ``messages``: turns of ``role`` and ``content``
- ``conversations``: turns of ``from`` and ``value``
- ``prompt`` and ``completion``: two strings, or two lists of messages
- ``instruction``, ``output`` and maybe ``input``; ``question`` and ``answer``
- ``text``
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spallm_serve.errors import UserError

MAX_LINE_BYTES = 16 * 2**20
MAX_LIST_BYTES = 256 * 2**20


class RowError(Exception):
    """Why a row is no example; who knows its place in the file makes a UserError of it."""


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not empty, each with its place ``path:line``.

    Raises:
        UserError: no such file, not a line in it, or a line beyond :data:`MAX_LINE_BYTES`.
    """
    empty = True
    with open_file(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{path}:{number}: longer than {MAX_LINE_BYTES // 2**20} MiB")
            if line.strip():
                empty = False
                yield f"{path}:{number}", line
    if empty:
        raise UserError(f"{path}: is empty")


def read_list(path: Path) -> list[Any] | None:
    """The list of rows that a ``.json`` file is; None if it is rows of JSONL.

    Raises:
        UserError: no such file, not JSON, an empty list, or beyond :data:`MAX_LIST_BYTES`.
    """
    if path.suffix != ".json":
        return None
    with open_file(path) as file:
        start = file.read(4096)
        if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return None
        content = start + file.read(MAX_LIST_BYTES)
    if len(content) > MAX_LIST_BYTES:
        raise UserError(
            f"{path}: one list of more than {MAX_LIST_BYTES // 2**20} MiB, which would be read "
            "whole; write it as .jsonl, one row a line"
        )
    rows = _parse(content, str(path))
    if not rows:
        raise UserError(f"{path}: is empty")
    return list(rows)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file opened for reading.

    Raises:
        UserError: it is not there, or reading it fails, also later.
    """
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def stream_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a file as they are asked for, each with its place.

    Raises:
        UserError: unreadable, empty, or a row that is not JSON.
    """
    rows = read_list(path)
    if rows is None:
        for where, line in read_lines(path):
            yield where, _parse(line, where)
    else:
        for number, row in enumerate(rows, start=1):
            yield f"{path}: row {number}", row


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error})") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error


@dataclass(frozen=True)
class Chat:
    """Messages for the chat template; the assistant's after the first ``given`` are outputs."""

    messages: list[dict[str, str]]
    given: int = 0


@dataclass(frozen=True)
class Plain:
    """A text without template, of which the end is output."""

    context: str
    output: str


_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip


def read_row(row: object, templated: bool) -> Chat | Plain:
    """What a row says, in whichever format.

    Args:
        row: as parsed.
        templated: whether the model has a chat template; a request and its output become a chat.

    Raises:
        RowError: none of the formats, or nothing to learn in it.
    """
    if not isinstance(row, dict):
        raise RowError("not an object")
    match {field: value for field, value in row.items() if value is not None}:
        case {"messages": turns}:
            return Chat(_messages(turns, "messages"))
        case {"conversations": turns}:
            return Chat(_messages(turns, "conversations", "from", "value"))
        case {"prompt": list(prompt), "completion": list(completion)}:
            given = _messages(prompt, "prompt")
            return Chat(given + _messages(completion, "completion"), len(given))
        case {"prompt": prompt, "completion": completion}:
            request, output = _text(prompt, "prompt"), _output(completion, "completion")
            return _exchange(request, output) if templated else Plain(request, output)
        case {"instruction": instruction, "output": answer, **rest}:
            request, output = _text(instruction, "instruction"), _output(answer, "output")
            extra = _text(rest.get("input", ""), "input")
            if templated:
                return _exchange(f"{request}\n\n{extra}" if extra else request, output)
            extra = f"### Input:\n{extra}\n\n" if extra else ""
            return Plain(f"### Instruction:\n{request}\n\n{extra}### Response:\n", output)
        case {"question": question, "answer": answer}:
            request, output = _text(question, "question"), _output(answer, "answer")
            if templated:
                return _exchange(request, output)
            return Plain(f"Question:\n{request}\n\nAnswer:\n", output)
        case {"text": text}:
            return Plain("", _output(text, "text"))
    raise RowError(
        'none of the known formats, whose fields are "messages"; "conversations"; "prompt" and '
        '"completion"; "instruction", "output" (and "input"); "question" and "answer"; or "text"'
    )


def _exchange(request: str, output: str) -> Chat:
    turns = (("user", request), ("assistant", output))
    return Chat([{"role": role, "content": content} for role, content in turns])


def _messages(
    turns: object, field: str, role_key: str = "role", content_key: str = "content"
) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise RowError(f'"{field}" is no list of turns')
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {role_key, content_key} <= turn.keys():
            raise RowError(f'turn {number} of "{field}" has no "{role_key}" and "{content_key}"')
        role = _ROLES.get(_text(turn[role_key], role_key))
        if role is None:
            raise RowError(
                f"turn {number} is of the role {turn[role_key]!r}, none of {', '.join(_ROLES)}"
            )
        check = _output if role == "assistant" else _text
        messages.append({"role": role, "content": check(turn[content_key], content_key)})
    return messages


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(f'"{field}" is no string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f'"{field}" has half a surrogate pair, which is no character') from error
    return value


def _output(value: object, field: str) -> str:
    text = _text(value, field)
    if not text.strip():
        raise RowError(f'"{field}" is empty: there is no output to learn')
    return text
