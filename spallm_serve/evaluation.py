"""Perplexity, loss, divergence from another model, each with a standard error; answers.

Tokens of one window are correlated, so windows are what is counted as independent: a standard error
is that of the mean over windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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


def token_loss_estimate(sums: Tensor, counts: Tensor) -> Estimate:
    """Mean loss of a token over independent examples of several tokens each.

    Args:
        sums: loss of each example's tokens, ``[n]``.
        counts: how many tokens each has, ``[n]``.

    Returns:
        All losses over all tokens; its error is a ratio's, by the delta method.
    """
    sums, counts = sums.double(), counts.double()
    mean = float(sums.sum() / counts.sum())
    number = len(sums)
    if number < 2:
        return Estimate(mean, math.nan)
    deviation = (sums - mean * counts).square().sum() * number / (number - 1)
    return Estimate(mean, float(deviation.sqrt() / counts.sum()))


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
