"""The MLPs and attentions of a model that can be sparse, and what they have to look like."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from spallm_serve.errors import UserError
from spallm_serve.layers import SketchedLinear
from spallm_serve.models import decoder_blocks, is_norm
from spallm_serve.trainer.gated_mlp import is_gated
from spallm_serve.trainer.sparselora.plan import SparsityPlan
from spallm_serve.trainer.sparselora.settings import ATTENTION_LINEARS, MLP_LINEARS
from spallm_serve.trainer.sparselora.slices import is_sliceable, values_of

_PROBE_TOKENS = 4
_PROBE_ERROR = 0.02


@dataclass(frozen=True)
class Site:
    """One module that computes few channels for context tokens.

    Attributes:
        block: the decoder block it is part of.
        name: of the module in the model.
        sparsity: share of the channels that context tokens do without.
        linears: those that are sliced, by their last name: gate_proj, up_proj and down_proj, or
            v_proj and o_proj, before them q_proj and k_proj where these may be sparse.
        head: channels of a head; 0 for an MLP.
    """

    block: nn.Module
    name: str
    sparsity: float
    linears: dict[str, nn.Linear | SketchedLinear]
    head: int = 0

    @property
    def module(self) -> nn.Module:
        """The MLP or attention."""
        return self.block.get_submodule(self.kind)

    @property
    def kind(self) -> str:
        """``mlp`` or ``self_attn``."""
        return self.name.rpartition(".")[2]

    @property
    def estimated(self) -> dict[str, nn.Linear | SketchedLinear]:
        """The linears whose outputs are estimated, by their name in the model."""
        return {
            f"{self.name}.{name}": linear
            for name, linear in self.linears.items()
            if name not in ("down_proj", "o_proj")
        }


def find_sites(model: PreTrainedModel, plan: SparsityPlan) -> list[Site]:
    """The sparse MLPs and attentions of a plan, in the order of the layers.

    Args:
        model: without LoRA.
        plan: for as many layers as the model has.

    Raises:
        UserError: an MLP or attention that is to be sparse and is not built as this needs it.
    """
    prefix, blocks = decoder_blocks(model)
    sites = []
    for number, block in enumerate(blocks):
        name = f"{prefix}.{number}"
        if plan.self_attn[number]:
            sites.append(_attention(block, f"{name}.self_attn", plan.self_attn[number]))
        if plan.mlp[number]:
            sites.append(_mlp(block, f"{name}.mlp", plan.mlp[number]))
    return sites


def check_targets(sites: Iterable[Site], targets: Collection[str]) -> None:
    """Refuse a LoRA inside a sparse MLP.

    Raises:
        UserError: one of the targets is a linear of an MLP among the sites.
    """
    wanted = [name for name in MLP_LINEARS if name in targets]
    sparse = [site.name for site in sites if site.kind == "mlp"]
    if wanted and sparse:
        raise UserError(
            f"{sparse[0]}: a sparse MLP cannot have a LoRA on {', '.join(wanted)}: it would need "
            "the channels that context tokens do without. Leave the MLP's linears out of the "
            "targets, or make no MLP sparse (sparsity: none, or a mapping without mlp)"
        )


def _attention(block: nn.Module, name: str, sparsity: float) -> Site:
    linears = _linears(block, name, ATTENTION_LINEARS)
    attention = block.get_submodule("self_attn")
    query, key, value, output = (linears[part] for part in ATTENTION_LINEARS)
    head = getattr(attention, "head_dim", 0)
    widths = query.out_features, key.out_features
    if (
        not isinstance(head, int)
        or head < 2
        or head % 2
        or widths[1] % head
        or widths[0] % widths[1]
        or value.out_features != widths[1]
        or output.in_features != widths[0]
    ):
        raise _unsupported(
            name,
            "q_proj and o_proj of as many channels, k_proj and v_proj of as many, all heads of an "
            "even number of channels, head_dim",
        )
    norms = [child for child, module in attention.named_children() if is_norm(module)]
    if any(child.startswith("v") for child in norms):
        raise _unsupported(name, "values that are not normalised")
    if norms:
        # Zeroed channels would make the norm scale the others up.
        del linears["q_proj"], linears["k_proj"]
    return Site(block, name, sparsity, linears, head)


def _mlp(block: nn.Module, name: str, sparsity: float) -> Site:
    linears = _linears(block, name, MLP_LINEARS)
    gate = linears["gate_proj"]
    values = values_of(gate)
    dtype = torch.float32 if isinstance(gate, SketchedLinear) else values.dtype
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, _PROBE_TOKENS, gate.in_features, generator=generator)
    if not is_gated(block.get_submodule("mlp"), probe.to(values.device, dtype), _PROBE_ERROR):
        raise _unsupported(name, "down_proj(act_fn(gate_proj(x)) * up_proj(x))")
    return Site(block, name, sparsity, linears)


def _linears(
    block: nn.Module, name: str, parts: tuple[str, ...]
) -> dict[str, nn.Linear | SketchedLinear]:
    module = getattr(block, name.rpartition(".")[2], None)
    linears = {}
    for part in parts:
        linear = getattr(module, part, None)
        if not is_sliceable(linear):
            raise _unsupported(name, f"linear layers {', '.join(parts)}")
        linears[part] = linear
    return linears


def _unsupported(name: str, needed: str) -> UserError:
    return UserError(
        f"{name}: cannot be sparse in this architecture: that takes {needed}. Choose "
        "sparsity: none (plain LoRA), or a mapping that leaves it out"
    )
