"""Floating point operations of a LoRA step and of a SparseLoRA step, by formula."""

from __future__ import annotations

from spallm_serve.trainer.flops import BlockShape
from spallm_serve.trainer.sparselora.plan import SparsityPlan
from spallm_serve.trainer.sparselora.select import kept_count, kept_pairs


def base_flops(shape: BlockShape, mlp: float = 0.0, attention: float = 0.0) -> float:
    """Operations a token takes in the frozen linears of one block, forward and backward.

    A multiplication by a frozen ``[out, in]`` matrix is ``2 out in`` forward and as much for the
    gradient of its input, so a block takes ``2 [2 D (2 Q + 2 KV) + 6 D F]``, less the channels that
    are left out.

    Args:
        shape: of the block.
        mlp, attention: sparsity for this token.
    """
    hidden, values = shape.hidden, shape.values
    value_share = kept_count(values, attention) / values
    query_share = 1.0 if shape.dense_queries else 2 * kept_pairs(values, attention) / values
    if not attention:
        value_share = query_share = 1.0
    mlp_share = kept_count(shape.inner, mlp) / shape.inner if mlp else 1.0
    value_and_output = 2 * hidden * (values + shape.queries) * value_share
    query_and_key = 2 * hidden * (shape.queries + values) * query_share
    return 2 * (query_and_key + value_and_output + 6 * hidden * shape.inner * mlp_share)


def lora_flops(parameters: int) -> int:
    """Operations a token takes in LoRAs of so many parameters: forward, and backward to its input
    and to the parameters."""
    return 6 * parameters


def predicted_share(
    shape: BlockShape,
    plan: SparsityPlan,
    context_share: float,
    dense_steps: float,
    lora_per_token: float = 0.0,
) -> float:
    """Operations of a SparseLoRA run in its blocks as a share of the same run with LoRA.

    Estimators (below 1 %), attention scores and the head are left out.

    Args:
        shape: of the blocks.
        plan: how sparse each is.
        context_share: c, the share of the tokens that is context.
        dense_steps: the share of the steps that is dense.
        lora_per_token: operations a token takes in the LoRAs of all blocks.
    """
    dense = len(plan.mlp) * base_flops(shape) + lora_per_token
    context = lora_per_token + sum(
        base_flops(shape, mlp, attention)
        for mlp, attention in zip(plan.mlp, plan.self_attn, strict=True)
    )
    sparse = (1 - context_share) * dense + context_share * context
    return dense_steps + (1 - dense_steps) * sparse / dense
