"""Which tokens of a batch are computed sparsely: those that are no output and predict none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spallm_serve.examples import IGNORED
from spallm_serve.trainer.method import Batch

# Tokens whose activations are looked at to choose channels. On SmolLM2-135M, 128 of 1024 evenly
# spaced ones find channels as good as all do (within 0.02 of the activations' energy, at 3 and at
# 10 % of the channels), where the average over each sequence, which the authors' code looks at,
# loses up to 0.07. Looking at all takes three quarters of what the sparse MLP takes, at 128 2 %.
SCORED_TOKENS = 128


@dataclass(frozen=True)
class TokenSplit:
    """An order of a batch's tokens with those to compute sparsely first.

    Attributes:
        order: int64 ``[tokens]``, positions in the flattened batch: context, then the rest.
        inverse: int64 ``[tokens]``, the place of each token in that order.
        context: how many are context.
        scored: int64 positions of the context tokens that the channels are chosen for.
    """

    order: Tensor
    inverse: Tensor
    context: int
    scored: Tensor


@dataclass
class CurrentBatch:
    """What the sparse layers of one model know about the batch that passes through them.

    Attributes:
        split: None where all tokens are computed densely.
    """

    split: TokenSplit | None = None


def dense_tokens(labels: Tensor) -> Tensor:
    """The tokens that are computed densely: each output, and each token that predicts one.

    Per token and not one window for the whole batch, so that chats of many turns and rows of
    unequal prompts save too (SparseLoRA, section 3.3, splits context from output).

    Args:
        labels: int64 ``[rows, tokens]``, aligned with the inputs; -100 where there is no loss.

    Returns:
        bool ``[rows, tokens]``.
    """
    dense = labels != IGNORED
    dense[:, :-1] |= labels[:, 1:] != IGNORED
    return dense


def split_batch(batch: Batch) -> TokenSplit | None:
    """Order a batch's tokens; None where no token is context.

    Padding is context. Channels are chosen for evenly spaced context tokens that are no padding
    and for the first token of every sequence: later tokens park their attention there, and in some
    layers (of SmolLM2-135M the last ones) a few channels of it hold nearly all energy.

    Args:
        batch: as the loop gives it to a method.
    """
    context = ~dense_tokens(batch["labels"]).flatten()
    positions = context.nonzero().squeeze(1)
    real, first = _real_and_first(batch)
    real = (real.flatten() & context).nonzero().squeeze(1)
    if not len(real):
        return None
    order = torch.cat([positions, (~context).nonzero().squeeze(1)])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    step = -(-len(real) // SCORED_TOKENS)
    firsts = (first.flatten() & context).nonzero().squeeze(1)
    scored = torch.cat([real[::step], firsts]).unique()
    return TokenSplit(order, inverse, len(positions), scored)


def context_share(labels: Tensor) -> float:
    """The share of a batch's tokens, 0 to 1, that is context (padding included)."""
    return 1 - float(dense_tokens(labels).float().mean())


def _real_and_first(batch: Batch) -> tuple[Tensor, Tensor]:
    """The tokens that are no padding and those that begin a sequence, bool ``[rows, tokens]``."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    real = torch.ones_like(batch["labels"], dtype=torch.bool) if mask is None else mask != 0
    first = real.cumsum(1) == 1 if positions is None else positions == 0
    return real, real & first
