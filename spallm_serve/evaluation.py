"""Perplexity, divergence from another model and multiple choice, each with a standard error.

Tokens of one window are correlated, so windows are what is counted as independent: a standard error
is that of the mean over windows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Estimate:
    """A measured mean.

    Attributes:
        value: the mean.
        standard_error: of that mean; NaN from a single observation.
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        if math.isnan(self.standard_error):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


@dataclass(frozen=True)
class Comparison:
    """Two models on the same text.

    Attributes:
        original, compressed: perplexities.
        divergence: mean KL(original || compressed) in nats per token.
        agreement: share of tokens where both put the same token first.
        windows, tokens: how much text, in windows and predicted tokens.
    """

    original: Estimate
    compressed: Estimate
    divergence: Estimate
    agreement: Estimate
    windows: int
    tokens: int


def mean_estimate(values: Tensor) -> Estimate:
    """Mean and standard error of independent observations ``[n]``."""
    values = values.double()
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error)


def perplexity_estimate(losses: Tensor) -> Estimate:
    """Perplexity from the mean loss of each window ``[windows]``; its error by the delta method."""
    loss = mean_estimate(losses)
    perplexity = math.exp(loss.value)
    return Estimate(perplexity, perplexity * loss.standard_error)


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, on_window: Callable[[int], None] | None = None
) -> Estimate:
    """Perplexity over windows, each from an empty context.

    Args:
        model: a causal LM.
        windows: token ids, int64 ``[windows, seqlen]``.
        on_window: called with the number of windows done.
    """
    losses = []
    for number, window in enumerate(windows.split(1), start=1):
        losses.append(window_loss(_log_probabilities(model, window), window))
        if on_window is not None:
            on_window(number)
    return perplexity_estimate(torch.stack(losses))


@torch.no_grad()
def compare(
    original: nn.Module,
    compressed: nn.Module,
    windows: Tensor,
    on_window: Callable[[int], None] | None = None,
) -> Comparison:
    """Perplexities, mean KL divergence and top-1 agreement of two models with one vocabulary.

    Args:
        original: the reference.
        compressed: what is judged.
        windows: token ids, int64 ``[windows, seqlen]``.
        on_window: called with the number of windows done.
    """
    rows = []
    for number, window in enumerate(windows.split(1), start=1):
        wanted = _log_probabilities(original, window)
        given = _log_probabilities(compressed, window)
        rows.append(
            torch.stack(
                [
                    window_loss(wanted, window),
                    window_loss(given, window),
                    F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1).mean(),
                    (wanted.argmax(-1) == given.argmax(-1)).float().mean(),
                ]
            )
        )
        if on_window is not None:
            on_window(number)
    columns = torch.stack(rows).T
    return Comparison(
        original=perplexity_estimate(columns[0]),
        compressed=perplexity_estimate(columns[1]),
        divergence=mean_estimate(columns[2]),
        agreement=mean_estimate(columns[3]),
        windows=windows.shape[0],
        tokens=windows.shape[0] * (windows.shape[1] - 1),
    )


def window_loss(log_probabilities: Tensor, window: Tensor) -> Tensor:
    """Mean negative log likelihood of a window's tokens but the first, in nats.

    Args:
        log_probabilities: ``[seqlen - 1, vocabulary]``.
        window: ``[1, seqlen]``.
    """
    return F.nll_loss(log_probabilities, window[0, 1:])


def _log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """float32 ``[seqlen - 1, vocabulary]``: what was predicted for each token but the first."""
    logits = model(input_ids=window, use_cache=False).logits
    return F.log_softmax(logits[0, :-1].float(), dim=-1)


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


@torch.no_grad()
def choose(model: nn.Module, tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
    """The option that is likeliest as the model's answer ``the correct answer is OPTION``.

    The mean log likelihood of the option's tokens decides, so that longer names are not at a
    disadvantage.
    """
    prompt = _answer_prompt(tokenizer, question.prompt)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # A compressed model may have no parameter, another one no buffer.
    device = next(chain(model.parameters(), model.buffers())).device
    scores = []
    for option in question.options:
        whole = tokenizer(f"{prompt} {option}", add_special_tokens=False)["input_ids"]
        shared = _shared_prefix(start, whole)
        window = torch.tensor([whole], device=device)
        likelihood = _log_probabilities(model, window)[shared - 1 :]
        scores.append(-F.nll_loss(likelihood, window[0, shared:]))
    return int(torch.stack(scores).argmax())


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


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int
) -> str:
    """A model's greedy answer.

    Args:
        model: a causal LM.
        tokenizer: its own; with a chat template the question is a user's turn.
        question: what is asked.
        tokens: of the answer, at most.
    """
    prompt = question
    if tokenizer.chat_template is not None:
        prompt = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        )
    given = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    written = model.generate(**given, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    start = given["input_ids"].shape[1]
    return str(tokenizer.decode(written[0, start:], skip_special_tokens=True)).strip()


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
