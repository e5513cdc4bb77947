"""What SparseLoRA will save on some data, said before it starts."""

from __future__ import annotations

from spallm_serve.trainer.flops import BlockShape
from spallm_serve.trainer.method import Savings
from spallm_serve.trainer.sparselora.flops import predicted_share
from spallm_serve.trainer.sparselora.plan import SparsityPlan

# Above this share of the operations, choosing and gathering channels eats what is saved.
BREAK_EVEN = 0.95
# On CPUs. Blocks that are narrower take as long for that as for their products.
NARROWEST = 256


def predict_savings(
    shape: BlockShape | None,
    plan: SparsityPlan,
    context_share: float,
    dense_steps: float,
    lora_per_token: int,
) -> Savings:
    """A run's operations in the decoder blocks as a share of LoRA's, and whether that can pay.

    Args:
        shape: of the blocks; None where they are of another architecture.
        plan: how sparse each is.
        context_share: of the data's tokens.
        dense_steps: share of the steps that is dense.
        lora_per_token: operations a token takes in all LoRAs.
    """
    if shape is None or plan.is_dense:
        return Savings(1.0, "no layer is sparse: this is plain LoRA")
    share = predicted_share(shape, plan, context_share, dense_steps, lora_per_token)
    found = f"{share:.0%} of LoRA's operations in the decoder blocks"
    context = f"{context_share:.0%} of the tokens are context"
    sparse = f"{_count(plan.mlp)} MLPs and {_count(plan.self_attn)} attentions sparse"
    if shape.hidden < NARROWEST:
        reason = f"a width of {shape.hidden} is too small to gain time by leaving channels out"
        return Savings(share, f"cannot pay, use plain LoRA: {found}, but {reason}")
    if share < BREAK_EVEN:
        return Savings(share, f"{found}: {context}, {sparse}")
    best = predicted_share(shape, plan, 1.0, dense_steps, lora_per_token)
    reason = (
        f"too little is sparse ({sparse})"
        if best >= BREAK_EVEN
        else f"only {context}, and outputs are computed densely"
    )
    return Savings(share, f"cannot pay, use plain LoRA: {found}; {reason}")


def _count(sparsities: tuple[float, ...]) -> str:
    return f"{sum(sparsity > 0 for sparsity in sparsities)} of {len(sparsities)}"
