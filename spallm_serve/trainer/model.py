"""A causal LM that gives its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from spallm_serve.examples import IGNORED
from spallm_serve.layers import SketchedLinear


class LossModel(nn.Module):
    """Next-token loss of a causal LM, with logits only for the tokens that have one.

    On small models the head is a fifth of the work, and logits over a whole vocabulary are the
    largest tensors of all.

    Args:
        lm: the model.
    """

    # What transformers' Trainer asks before it counts the tokens of a whole step.
    accepts_loss_kwargs = True

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.config = lm.config

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss, summed over the tokens that have one.

        Args:
            input_ids, labels, attention_mask, position_ids: int64 ``[rows, tokens]``; see
                :func:`spallm_serve.batches.collate`.
            num_items_in_batch: what to divide the sum by: the loss tokens of the whole step. None
                is those of this batch.

        Returns:
            ``loss``, a float32 scalar.
        """
        # The token at t is predicted at t - 1.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        kept = targets != IGNORED
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        head = self.lm.get_output_embeddings()

        def only_kept(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            return (args[0][kept],)

        handle = head.register_forward_pre_hook(only_kept)
        try:
            # Without a cache, or packed rows would not be kept apart.
            logits = self.lm(
                input_ids=input_ids,
                use_cache=False,
                **{name: value for name, value in given.items() if value is not None},
            ).logits
        finally:
            handle.remove()
        total = _SummedLoss.apply(logits, targets[kept])
        count = kept.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}


class _SummedLoss(torch.autograd.Function):
    """Cross entropy in float32, of which the backward pass keeps the logits in their own dtype."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        found = F.log_softmax(logits, dim=-1, dtype=torch.float32).exp_().mul_(gradient)
        found[torch.arange(len(targets), device=targets.device), targets] -= gradient
        return found.to(logits.dtype), None


def freeze(model: nn.Module) -> None:
    """Let no parameter take a gradient."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def prepare_codes(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the codes of all compressed linears into the order of their kernels.

    Left to the first step, they and the files they are mapped from would be in memory together
    with its activations.

    Args:
        model: with the trainable parts in place: some look at the codes as they are in the file.
        dtype: of the activations.
    """
    for module in model.modules():
        if isinstance(module, SketchedLinear):
            module.prepare(dtype)
