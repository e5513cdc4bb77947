"""JSON from strangers: bounded in size and depth, without what parsers disagree about."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from spallm_serve.adapters_store.failures import RejectedError

# Strings are one match each, so brackets inside them are not counted.
_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)


def parse_json(text: bytes, what: str, *, depth: int) -> Any:
    """Parse JSON.

    Args:
        text: in UTF-8.
        what: the text's name in messages.
        depth: how far objects and lists may be nested.

    Raises:
        RejectedError: not JSON in UTF-8, nested too deep, a name given twice in one object, or NaN
            and Infinity, which JSON does not have.
    """
    try:
        decoded = text.decode("utf-8")
        _check_depth(decoded, what, depth)
        return json.loads(
            decoded,
            object_pairs_hook=lambda pairs: _object(pairs, what),
            parse_constant=lambda word: _no_constant(word, what),
        )
    except UnicodeDecodeError as error:
        raise RejectedError(f"{what}: is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise RejectedError(f"{what}: is not JSON ({str(error)[:200]})") from error


def _check_depth(text: str, what: str, most: int) -> None:
    depth = 0
    for match in _STRINGS_AND_BRACKETS.finditer(text):
        if match[0] in "[{":
            depth += 1
            if depth > most:
                raise RejectedError(f"{what}: is nested deeper than {most} levels")
        elif match[0] in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RejectedError(f"{what}: {twice[:100]!r} is given twice")
    return found


def _no_constant(word: str, what: str) -> NoReturn:
    raise RejectedError(f"{what}: {word} is no number of JSON")
