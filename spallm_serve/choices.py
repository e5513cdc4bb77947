"""Multiple choice: which option a model finds likeliest, and how often that is the right one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from spallm_serve.errors import UserError
from spallm_serve.evaluation import Estimate, mean_estimate


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        prompt: the instruction.
        options: the answers to choose from, as the prompt names them.
        answer: position of the right one.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int


def parse_question(entry: object) -> Question:
    """A question in the LLM-Adapters format: ``instruction`` ends in ``Answer format: a/b/c``.

    Raises:
        ValueError: a field is missing, no answer format, or an answer that is none of the options.
    """
    if not isinstance(entry, dict):
        raise ValueError("expected an object")
    instruction, answer = entry.get("instruction"), entry.get("answer")
    if not isinstance(instruction, str) or not isinstance(answer, str):
        raise ValueError('expected the fields "instruction" and "answer"')
    found = re.search(r"Answer format:\s*(\S+)\s*$", instruction)
    if found is None:
        raise ValueError('the instruction does not end in "Answer format: a/b/..."')
    options = tuple(found.group(1).split("/"))
    if answer not in options:
        raise ValueError(f"answer {answer!r} is none of {'/'.join(options)}")
    text = instruction if not entry.get("input") else f"{instruction}\n{entry['input']}"
    return Question(text, options, options.index(answer))


def read_questions(path: Path) -> list[Question]:
    """The questions of a file: a JSON list, or JSONL.

    Raises:
        UserError: unreadable, empty, or an entry that is no question; says which and why.
    """
    try:
        raw = path.read_text(encoding="utf-8")
        entries = (
            [json.loads(line) for line in raw.split("\n") if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(raw)
        )
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list of questions, and at least one")
    questions = []
    for number, entry in enumerate(entries, start=1):
        try:
            questions.append(parse_question(entry))
        except ValueError as error:
            raise UserError(f"{path}: question {number}: {error}") from error
    return questions


@torch.no_grad()
def choose(model: nn.Module, tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
    """The option that is likeliest as the model's answer ``the correct answer is OPTION``.

    The mean log likelihood of the option's tokens decides, so that longer names are not at a
    disadvantage. The prompt runs once for all options, and these run together.
    """
    prompt = _answer_prompt(tokenizer, question.prompt)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answers = [
        tokenizer(f"{prompt} {option}", add_special_tokens=False)["input_ids"]
        for option in question.options
    ]
    shared = [_shared_prefix(start, each) for each in answers]
    # What predicts the first token that any option has of its own is not in it.
    common = max(min(shared) - 1, 0)
    # A compressed model may have no parameter, another one no buffer.
    device = next(chain(model.parameters(), model.buffers())).device
    cache = None
    if common:
        given = torch.tensor([start[:common]], device=device)
        cache = model(input_ids=given, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(answers))
    # Shorter ones are filled up at their end, where nothing of theirs looks.
    rest = [torch.tensor(ids[common:], device=device) for ids in answers]
    logits = model(input_ids=pad_sequence(rest, batch_first=True), past_key_values=cache).logits
    scores = []
    for ids, first, found in zip(rest, shared, logits, strict=True):
        own = first - common
        likelihood = F.log_softmax(found[own - 1 : len(ids) - 1].float(), dim=-1)
        scores.append(-F.nll_loss(likelihood, ids[own:]))
    return int(torch.stack(scores).argmax())


@torch.no_grad()
def accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Iterable[Question],
    on_question: Callable[[int], None] | None = None,
) -> Estimate:
    """Share of questions answered right (see :func:`choose`)."""
    right = []
    for number, question in enumerate(questions, start=1):
        right.append(float(choose(model, tokenizer, question) == question.answer))
        if on_question is not None:
            on_question(number)
    return mean_estimate(torch.tensor(right))


def _answer_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> str:
    opening = "the correct answer is"
    if tokenizer.chat_template is None:
        return f"{instruction}\n\n{opening}"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}], tokenize=False, add_generation_prompt=True
    )
    return f"{chat}{opening}"


def _shared_prefix(first: list[int], second: list[int]) -> int:
    """How many leading tokens two texts share: a tokenizer may merge across the border."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
