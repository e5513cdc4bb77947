"""Training examples on the terminal: which tokens the model learns to write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from spallm_serve.examples import IGNORED, Example

_OUTPUT, _CONTEXT, _SPECIAL = "bold green", "dim", "underline"
# Where there are no colours, these set outputs apart.
_OPENING, _CLOSING = "⟦", "⟧"
# Control characters as their pictures: a terminal would obey the characters themselves.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "␡"}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")
_VISIBLE |= {ord("\n"): "↵\n", ord("\t"): "⇥\t"}
# A token may be a part of a character; a character has no more bytes than this.
_CHARACTER_BYTES = 4


def preview(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    """Print examples token by token, outputs apart from context, each with its counts.

    Args:
        examples: all of them are printed, in full.
        tokenizer: the one that made them.
        console: shows outputs in a colour; between ⟦ and ⟧ too where it has none.
    """
    coloured = console.color_system is not None and not console.no_color
    console.print(_legend(coloured))
    for number, example in enumerate(examples, start=1):
        console.print()
        console.print(Text(f"Example {number}: {_counts(example)}", style="bold"))
        console.print(_marked(example, tokenizer, coloured))


def _legend(coloured: bool) -> Text:
    output = "outputs" if coloured else f"{_OPENING}outputs{_CLOSING}"
    return Text.assemble(
        (output, _OUTPUT), " are learnt, ", ("the context", _CONTEXT), " is only read; ",
        ("special", _SPECIAL), " tokens, ↵ newline, ⇥ tab, · space that is a whole token",
    )  # fmt: skip


def _counts(example: Example) -> str:
    tokens, learnt = len(example.input_ids), sum(_learnt(example))
    counts = f"{tokens:,} tokens, {learnt:,} of them in the loss ({learnt / tokens:.0%})"
    return f"{counts}, {example.truncated:,} more cut off" if example.truncated else counts


def _learnt(example: Example) -> list[bool]:
    # Nothing comes before the first token that it could be predicted from.
    return [False, *(label != IGNORED for label in example.labels[1:])]


def _marked(example: Example, tokenizer: PreTrainedTokenizerBase, coloured: bool) -> Text:
    learnt = _learnt(example)
    special = set(tokenizer.all_special_ids)
    marked = Text()
    inside = False
    for start, stop, piece in _pieces(example.input_ids, learnt, tokenizer):
        if learnt[start] != inside and not coloured:
            _mark_border(marked, inside)
        inside = learnt[start]
        if piece.isspace():
            piece = piece.replace(" ", "·")
        style = _OUTPUT if inside else _CONTEXT
        if special.intersection(example.input_ids[start:stop]):
            style = f"{style} {_SPECIAL}"
        marked.append(piece.translate(_VISIBLE), style)
    if inside and not coloured:
        _mark_border(marked, inside)
    return marked


def _mark_border(marked: Text, inside: bool) -> None:
    if not inside:
        marked.append(_OPENING)
    elif marked.plain.endswith("\n"):
        # On the line that it closes.
        marked.right_crop(1)
        marked.append(f"{_CLOSING}\n")
    else:
        marked.append(_CLOSING)


def _pieces(
    ids: Sequence[int], learnt: list[bool], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, int, str]]:
    """The text of each token, or of the few tokens that make a character, and their places."""
    start = before = 0
    for stop in range(1, len(ids) + 1):
        # Decoded after its predecessor: some tokenizers leave out the space of a first word.
        known = _decode(ids[before:start], tokenizer)
        piece = _decode(ids[before:stop], tokenizer)[len(known) :]
        incomplete = piece.endswith("\N{REPLACEMENT CHARACTER}")
        border = stop == len(ids) or learnt[stop] != learnt[start]
        if not incomplete or border or stop - start == _CHARACTER_BYTES:
            yield start, stop, piece
            before, start = start, stop


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
