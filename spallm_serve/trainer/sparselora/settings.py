"""What a user can choose about SparseLoRA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")

_Site = Annotated[str, Field(pattern=r"^layers\.(0|[1-9]\d*)\.(mlp|self_attn)$")]
_Share = Annotated[float, Field(ge=0, lt=1)]


class SparseLoraSettings(BaseModel):
    """Settings of SparseLoRA.

    Attributes:
        rank, alpha, dropout: of the LoRA, as PEFT means them.
        targets: last part of the names of the linears that get a LoRA. One on a sparse MLP's
            linears is refused: the channels it adds to would not all be computed.
        sparsity: share of the channels that context tokens do without. ``o1`` and ``o2`` are the
            paper's presets, ``auto`` measures how much each layer bears, ``none`` is plain LoRA; or
            a mapping such as ``{"layers.3.mlp": 0.97, "layers.3.self_attn": 0.2}``, in which what
            is not named stays dense.
        start: first share of the steps, in which all is dense (the paper's upper limit is 10 %).
        context_attn_backward: ``exact``: gradients go through the sparse products of q, k, v and o;
            ``stop``: for context tokens they only go through LoRA and the residual stream there, as
            in the authors' code. Cheaper, but another gradient than that of the loss.
        estimator_rank: of the factors that channels are chosen by; where a checkpoint brings its
            own, those count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, ge=1, le=4096)
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(default=ATTENTION_LINEARS, min_length=1)
    sparsity: Literal["o1", "o2", "auto", "none"] | dict[_Site, _Share] = "o1"
    start: float = Field(default=0.05, ge=0, le=0.1)
    context_attn_backward: Literal["exact", "stop"] = "exact"
    estimator_rank: int = Field(default=8, ge=1, le=1024)
