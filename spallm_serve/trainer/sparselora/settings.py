"""What a user can choose about SparseLoRA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")

_Site = Annotated[str, Field(pattern=r"^layers\.(0|[1-9]\d*)\.(mlp|self_attn)$")]
_Share = Annotated[float, Field(ge=0, lt=1)]


class SparseLoraSettings(BaseModel):
    """Settings of SparseLoRA."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, ge=1, le=4096, description="of the LoRA")
    alpha: float = Field(
        default=32.0, gt=0, allow_inf_nan=False, description="the LoRA is scaled by alpha / rank"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="in the LoRA")
    targets: tuple[str, ...] = Field(
        default=ATTENTION_LINEARS,
        min_length=1,
        description="last part of the names of the layers that get a LoRA; those of a sparse MLP "
        "cannot, as the channels it adds to would not all be computed",
    )
    sparsity: Literal["o1", "o2", "auto", "none"] | dict[_Site, _Share] = Field(
        default="o1",
        description="share of the channels that context tokens do without. o1, o2: the paper's "
        "presets; auto: as much as each layer bears, measured; none: plain LoRA; or a mapping such "
        "as {layers.3.mlp: 0.97, layers.3.self_attn: 0.2}, what it does not name is dense",
    )
    start: float = Field(
        default=0.05, ge=0, le=0.1, description="first share of the steps, in which all is dense"
    )
    end: float = Field(
        default=0.2,
        ge=0,
        lt=0.5,
        description="last share of the steps, in which all is dense again; the paper has none. "
        "What the LoRA has learnt beside a sparse base then settles on the base it will be used on",
    )
    context_attn_backward: Literal["exact", "stop"] = Field(
        default="exact",
        description="stop: context tokens pass gradients of q, k, v and o only through the LoRA, "
        "as in the authors' code; cheaper, but not the loss's gradient",
    )
    estimator_rank: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="of the factors that channels are chosen by, where the base brings none",
    )
