"""MLP and attention of a decoder block that compute few channels for context tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from spallm_serve.layers import SketchedLinear
from spallm_serve.trainer.sparselora.ops import (
    frozen_product,
    join_tokens,
    place_channels,
    split_tokens,
    take_channels,
)
from spallm_serve.trainer.sparselora.select import (
    Factors,
    kept_count,
    kept_pairs,
    mlp_scores,
    pair_channels,
    query_channels,
    query_key_scores,
    strongest,
    value_scores,
)
from spallm_serve.trainer.sparselora.settings import MLP_LINEARS
from spallm_serve.trainer.sparselora.slices import columns_of, rows_of
from spallm_serve.trainer.sparselora.tokens import CurrentBatch, TokenSplit

Linear = nn.Linear | SketchedLinear


class _Factors(nn.Module):
    """Factors that move with the model."""

    a: Tensor
    b: Tensor

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.register_buffer("a", factors.a.float(), persistent=False)
        self.register_buffer("b", factors.b.float(), persistent=False)

    def forward(self) -> Factors:
        return Factors(self.a, self.b)


class SparseMlp(nn.Module):
    """A gated MLP, ``down(act(gate(x)) * up(x))``, of few channels for context tokens.

    Which channels is chosen anew in every forward pass from what comes in, so a pass repeated by
    gradient checkpointing chooses the same. Dense in evaluation.

    Args:
        mlp: has ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``; frozen.
        sparsity: share of the channels that context tokens do without.
        factors: estimators of gate_proj and up_proj.
        batch: of the model this is part of.
    """

    def __init__(
        self,
        mlp: nn.Module,
        sparsity: float,
        factors: Mapping[str, Factors],
        batch: CurrentBatch,
    ) -> None:
        super().__init__()
        self.dense = mlp
        self._batch = batch
        gate, up, down = (_linear(mlp, name) for name in MLP_LINEARS)
        self._linears = gate, up, down  # in a tuple: they are submodules of the MLP
        self._activation: Callable[[Tensor], Tensor] = mlp.act_fn  # type: ignore[assignment]
        self._kept = kept_count(gate.out_features, sparsity)
        self._gate_factors = _Factors(factors["gate_proj"])
        self._up_factors = _Factors(factors["up_proj"])
        self._gate_rows, self._up_rows = rows_of(gate), rows_of(up)
        self._down_columns = columns_of(down)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width] -> [..., width]``."""
        split = self._batch.split
        if split is None or not self.training:
            y: Tensor = self.dense(x)
            return y
        tokens = x.flatten(0, -2)
        context, rest = split_tokens(tokens, split)
        channels = self.choose(tokens.index_select(0, split.scored))
        return join_tokens(self._sparse(context, channels), self.dense(rest), split).view_as(x)

    @torch.no_grad()
    def choose(self, scored: Tensor) -> Tensor:
        """The channels for tokens ``[tokens, width]``: int64, ascending."""
        gate, up, _ = self._linears
        estimated = self._gate_factors(), self._up_factors()
        scores = mlp_scores(scored, *estimated, self._activation, gate.bias, up.bias)
        return strongest(scores, self._kept)

    def _sparse(self, x: Tensor, channels: Tensor) -> Tensor:
        def gate_and_up(dtype: torch.dtype) -> Tensor:
            slices = [rows(channels, dtype) for rows in (self._gate_rows, self._up_rows)]
            return torch.cat(slices).T

        gate_linear, up_linear, down_linear = self._linears
        gate, up = frozen_product(x, gate_and_up).chunk(2, dim=1)
        if gate_linear.bias is not None:
            gate = gate + gate_linear.bias[channels]
        if up_linear.bias is not None:
            up = up + up_linear.bias[channels]
        hidden = self._activation(gate) * up
        y = frozen_product(hidden, lambda dtype: self._down_columns(channels, dtype))
        return y if down_linear.bias is None else y + down_linear.bias


class SparseAttention(nn.Module):
    """What the base branches of one attention's q, k, v and o have in common.

    The three that read the block's input are computed together when the first of them is asked.
    For context tokens the channels that were not chosen are zero (their bias stays) before LoRA
    adds to them, and before RoPE; o then reads the chosen channels of the values only. LoRA is not
    in here: it is computed for all tokens and channels, as ever.

    Args:
        linears: v_proj and o_proj, and q_proj and k_proj where they may be sparse too; frozen.
        head: channels of a head.
        sparsity: share of the channels that context tokens do without.
        factors: estimators of the linears but o_proj.
        batch: of the model this is part of.
        exact: whether gradients go through the sparse products.
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        head: int,
        sparsity: float,
        factors: Mapping[str, Factors],
        batch: CurrentBatch,
        exact: bool,
    ) -> None:
        super().__init__()
        self._batch, self._head, self._exact = batch, head, exact
        names = [name for name in linears if name != "o_proj"]
        self._linears = dict(linears)  # submodules of the branches, not of this one
        values = linears["v_proj"].out_features
        self._groups = linears["o_proj"].in_features // values
        self._kept = kept_count(values, sparsity)
        self._kept_pairs = kept_pairs(values, sparsity)
        self._estimators = nn.ModuleDict({name: _Factors(factors[name]) for name in names})
        self._rows = nn.ModuleDict({name: rows_of(linears[name]) for name in names})
        self._columns = columns_of(linears["o_proj"])
        self._input: Tensor | None = None
        self._split: TokenSplit | None = None
        self._outputs: dict[str, Tensor] = {}
        self._value_channels = torch.empty(0, dtype=torch.int64)

    def project(self, name: str, x: Tensor) -> Tensor:
        """The base branch of one of the linears that read the block's input.

        Args:
            name: of the linear.
            x: ``[rows, tokens, width]``.

        Raises:
            RuntimeError: this attention gives its linears different inputs.
        """
        split = self._batch.split
        if split is None or not self.training:
            y: Tensor = self._linears[name](x)
            return y
        if x is not self._input or name not in self._outputs:
            if self._outputs and split is self._split:
                raise RuntimeError(
                    "q_proj, k_proj and v_proj do not read the same input in this architecture; "
                    "its attention has to stay dense (sparsity 0 for self_attn)"
                )
            self._input, self._split = x, split
            self._outputs = self._project_all(x, split)
        y = self._outputs.pop(name)
        if not self._outputs:
            self._input = None
        return y

    def output(self, x: Tensor) -> Tensor:
        """The base branch of o_proj.

        Args:
            x: ``[rows, tokens, query channels]``.
        """
        linear, split = self._linears["o_proj"], self._batch.split
        if split is None or not self.training:
            y: Tensor = linear(x)
            return y
        channels = query_channels(self._value_channels, self._head, self._groups)
        context, rest = split_tokens(x.flatten(0, -2), split)
        if not self._exact:
            context = context.detach()
        taken = take_channels(context, channels)
        y = frozen_product(taken, lambda dtype: self._columns(channels, dtype))
        if linear.bias is not None:
            y = y + linear.bias
        return join_tokens(y, linear(rest), split).view(*x.shape[:-1], -1)

    @torch.no_grad()
    def choose(self, scored: Tensor) -> dict[str, Tensor]:
        """The channels of each linear for tokens ``[tokens, width]``: int64, ascending."""
        estimators = {name: module() for name, module in self._estimators.items()}
        chosen = {"v_proj": strongest(value_scores(scored, estimators["v_proj"]), self._kept)}
        if "q_proj" in estimators:
            scores = query_key_scores(
                scored, estimators["q_proj"], estimators["k_proj"], self._head
            )
            keys = pair_channels(strongest(scores, self._kept_pairs), self._head)
            chosen["k_proj"] = keys
            chosen["q_proj"] = query_channels(keys, self._head, self._groups)
        return chosen

    def _project_all(self, x: Tensor, split: TokenSplit) -> dict[str, Tensor]:
        tokens = x.flatten(0, -2)
        context, rest = split_tokens(tokens, split)
        chosen = self.choose(tokens.index_select(0, split.scored))
        self._value_channels = chosen["v_proj"]
        if not self._exact:
            context = context.detach()

        def slices(dtype: torch.dtype) -> Tensor:
            return torch.cat([self._rows[name](chosen[name], dtype) for name in chosen]).T

        parts = frozen_product(context, slices).split([len(c) for c in chosen.values()], dim=1)
        outputs = {}
        for (name, channels), part in zip(chosen.items(), parts, strict=True):
            linear = self._linears[name]
            placed = place_channels(part, channels, linear.out_features)
            if linear.bias is not None:
                placed = placed + linear.bias
            joined = join_tokens(placed, linear(rest), split)
            outputs[name] = joined.view(*x.shape[:-1], -1)
        return outputs


class SparseProjection(nn.Module):
    """Stands for q_proj, k_proj or v_proj, or is the base layer of their LoRA."""

    def __init__(self, linear: Linear, name: str, attention: SparseAttention) -> None:
        super().__init__()
        self.linear = linear
        self._name = name
        self._attention = (attention,)  # in a tuple, so that it has one place among the modules

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, tokens, width] -> [rows, tokens, channels]``."""
        return self._attention[0].project(self._name, x)


class SparseOutput(nn.Module):
    """Stands for o_proj, or is the base layer of its LoRA."""

    def __init__(self, linear: Linear, attention: SparseAttention) -> None:
        super().__init__()
        self.linear = linear
        self._attention = (attention,)

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, tokens, query channels] -> [rows, tokens, width]``."""
        return self._attention[0].output(x)


def _linear(module: nn.Module, name: str) -> Linear:
    found = getattr(module, name)
    assert isinstance(found, nn.Linear | SketchedLinear)
    return found
