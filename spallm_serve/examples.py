"""Training examples from a file: token ids, and which of them the model learns to write.

Chats, and the pairs of strings where the model has a chat template, are written by that template.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spallm_serve.errors import UserError
from spallm_serve.models import first_line
from spallm_serve.rows import Chat, Plain, RowError, open_file, read_row, stream_rows

IGNORED = -100
_BLOCK_CHARACTERS = 2**20


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        input_ids: token ids.
        labels: as many; the token itself where it is an output, else :data:`IGNORED`.
        truncated: tokens cut off to fit.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: int = 0


def stream_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, *, strict: bool = False
) -> Iterator[Example]:
    """The examples of a file, in its order, read as they are asked for.

    Outputs are the assistant's turns with what the template writes after them, the answer with the
    end-of-text token, or all of a ``text``. A text is tokenised as a whole: a token that reaches
    from the context into an output counts as context, one that begins in an output as output.

    An example that is too long loses the left of what comes before its first output, except for
    the beginning-of-text token, and one token of that is always kept to predict from. What then
    is still too much is cut off on the right.

    Args:
        path: rows of JSONL; a ``.json`` may be one list of rows, which is read whole; a ``.txt``
            is plain text, which gives examples of ``max_length`` tokens with all of them outputs.
        tokenizer: the model's; a fast one.
        max_length: tokens in an example, at least 2.
        strict: refuse examples that are too long instead.

    Raises:
        UserError: unreadable, empty, or a row that cannot be learnt from: says where and why.
    """
    if max_length < 2:
        raise ValueError(f"no token of an example of {max_length} tokens can be predicted")
    if not tokenizer.is_fast:
        raise UserError("training needs a fast tokenizer (tokenizer.json), which this model lacks")
    if path.suffix == ".txt":
        yield from _stream_chunks(path, tokenizer, max_length)
        return
    for where, row in stream_rows(path):
        try:
            ids, labels = _encode_row(row, tokenizer)
            if strict and len(ids) > max_length:
                raise RowError(f"{len(ids)} tokens, over the limit of {max_length}")
            example = _fit(ids, labels, max_length, tokenizer.bos_token_id)
        except RowError as error:
            raise UserError(f"{where}: {error}") from error
        yield example


def _encode_row(row: object, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    content = read_row(row, templated=tokenizer.chat_template is not None)
    if isinstance(content, Plain):
        ids, labels = _encode_plain(content, tokenizer)
    elif tokenizer.chat_template is None:
        raise RowError("the model's tokenizer has no chat template for a conversation")
    else:
        ids, labels = _encode(*_render_chat(content, tokenizer), tokenizer)
    # Nothing comes before the first token that it could be predicted from.
    if all(label == IGNORED for label in labels[1:]):
        raise RowError("every token is masked: none can be learnt")
    return ids, labels


def _render_chat(
    chat: Chat, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, and where in it the outputs begin and end."""

    def render(count: int, prompt: bool = False) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    chat.messages[:count], tokenize=False, add_generation_prompt=prompt
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise RowError(f"refused by the chat template ({first_line(error)})") from error

    if chat.messages[-1]["role"] != "assistant":
        raise RowError(f"ends with a turn of the {chat.messages[-1]['role']}: no output to learn")
    whole = render(len(chat.messages))
    spans = []
    for turn, message in enumerate(chat.messages):
        if turn < chat.given or message["role"] != "assistant":
            continue
        if turn == 0:
            raise RowError("begins with a turn of the assistant, which answers nothing")
        before, after = render(turn, prompt=True), render(turn + 1)
        if not after.startswith(before):
            raise RowError(
                f"turn {turn + 1} does not begin as the chat template's own generation prompt does"
            )
        if not whole.startswith(after):
            raise RowError(
                f"the chat template rewrites turn {turn + 1}, or one before it, when the chat goes "
                'on; make a row of each answer, with lists as "prompt" and "completion"'
            )
        # Templates may do without a generation prompt if the answer has no heading.
        answered = after[len(before) :].lstrip().startswith(message["content"].strip())
        if not answered and before == render(turn):
            raise RowError("a chat template without a generation prompt: cannot tell outputs")
        spans.append((len(before), len(after)))
    return whole, spans


def _encode_plain(plain: Plain, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    text = plain.context + plain.output
    ids, labels = _encode(text, [(len(plain.context), len(text))], tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and tokenizer("")["input_ids"][:1] == [bos] != ids[:1]:
        ids, labels = [bos, *ids], [IGNORED, *labels]
    if eos is not None and ids[-1:] != [eos]:
        ids, labels = [*ids, eos], [*labels, eos]
    return ids, labels


def _encode(
    text: str, outputs: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    is_output = bytearray(len(text) + 1)
    for start, stop in outputs:
        is_output[start:stop] = b"\1" * (stop - start)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels, done = [], 0
    for token, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        # Some tokenizers leave the space before a word out of its token's offsets.
        labels.append(token if is_output[min(start, done)] else IGNORED)
        done = max(done, stop)
    return list(encoding["input_ids"]), labels


def _fit(ids: list[int], labels: list[int], max_length: int, bos: int | None) -> Example:
    if len(ids) <= max_length:
        return Example(tuple(ids), tuple(labels))
    context = next(place for place, label in enumerate(labels) if label != IGNORED)
    kept = min(context, max(1, max_length - (len(ids) - context)))
    cut = context - kept
    head = int(cut > 0 and ids[0] == bos)
    fitted = slice(head + cut, head + cut + max_length - head)
    return Example(
        (*ids[:head], *ids[fitted]), (*labels[:head], *labels[fitted]), len(ids) - max_length
    )


def _stream_chunks(
    path: Path, tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[Example]:
    ids: list[int] = []
    found = False
    for block in _stream_blocks(path):
        ids += tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(ids) // length * length
        for start in range(0, whole, length):
            found = True
            chunk = tuple(ids[start : start + length])
            yield Example(chunk, chunk)
        del ids[:whole]
    if len(ids) > 1:
        yield Example(tuple(ids), tuple(ids))
    elif not found:
        raise UserError(f"{path}: is empty, or a single token")


def _stream_blocks(path: Path) -> Iterator[str]:
    """A text in blocks that end before a space between words, where no token spans the border."""
    rest = ""
    try:
        with open_file(path) as binary, TextIOWrapper(binary, encoding="utf-8-sig") as file:
            while block := file.read(_BLOCK_CHARACTERS):
                block = rest + block
                at = block.rfind(" ")
                while at > 0 and any(map(str.isspace, block[at - 1] + block[at + 1 : at + 2])):
                    at = block.rfind(" ", 0, at)
                yield block[:at] if at > 0 else block
                rest = block[at:] if at > 0 else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    if rest:
        yield rest
