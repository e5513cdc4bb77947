"""Floating point operations of a training step: counted as it runs, and by formula."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from spallm_serve.examples import IGNORED
from spallm_serve.models import decoder_blocks, is_norm


def counted_flops(step: Callable[[], object]) -> int:
    """The operations in the matrix products and attentions of a step, sketched layers' included."""
    with FlopCounterMode(display=False, custom_mapping=spallm_flops()) as counter:
        step()
    return int(counter.get_total_flops())


def _product(x: Any, codes: Any, tables: Any, *_: Any, **__: Any) -> int:
    return 2 * int(x[0] * x[1] * tables[1])


def _input_gradient(dy: Any, codes: Any, tables: Any, slots: Any, columns: int, **_: Any) -> int:
    return 2 * int(dy[0] * dy[1] * columns)


def _table_gradient(dy: Any, x: Any, *_: Any, **__: Any) -> int:
    return 2 * int(dy[0] * dy[1] * x[1])


def spallm_flops() -> dict[Any, Callable[..., int]]:
    """How many operations a sketch's products take, for ``FlopCounterMode(custom_mapping=...)``."""
    return {
        torch.ops.spallm.lut_linear: _product,
        torch.ops.spallm.input_gradient: _input_gradient,
        torch.ops.spallm.table_gradient: _table_gradient,
    }


@dataclass(frozen=True)
class BlockShape:
    """Widths of a decoder block.

    Attributes:
        hidden: D, of the residual stream.
        queries: Q, channels of q_proj and inputs of o_proj; D in most models.
        values: KV, channels of k_proj and of v_proj.
        inner: F, channels of the MLP.
        dense_queries: whether q and k are dense in a sparse attention (those that normalise them).
    """

    hidden: int
    queries: int
    values: int
    inner: int
    dense_queries: bool = False

    def weights(self) -> tuple[int, int, int, int]:
        """Weights in each stage of a block: q, k and v; o; gate and up; down."""
        return (
            self.hidden * (self.queries + 2 * self.values),
            self.queries * self.hidden,
            2 * self.hidden * self.inner,
            self.inner * self.hidden,
        )


_STAGES = {
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1,
    "gate_proj": 2, "up_proj": 2, "down_proj": 3,
}  # fmt: skip


def frozen_flops(
    shape: BlockShape,
    layers: int,
    trained: Iterable[str],
    batch: dict[str, Tensor],
    vocabulary: int,
) -> int:
    """Operations of a step in the frozen linears and the head.

    A multiplication by a frozen ``[out, in]`` matrix is ``2 out in`` a token forward, and as much
    backward where its input depends on anything that is trained. Attention scores are left out.

    Args:
        shape: of all blocks.
        layers: how many there are.
        trained: names of what is trained; gradients stop below the lowest of them.
        batch: its padding is computed too; the head sees the tokens that have a loss.
        vocabulary: rows of the head.
    """
    tokens = batch["labels"].numel()
    learnt = int((batch["labels"][:, 1:] != IGNORED).sum())
    lowest = min(place(name) for name in trained)
    weights = shape.weights()
    forward = layers * sum(weights)
    backward = sum(
        weights[stage]
        for layer in range(layers)
        for stage in range(len(weights))
        if (layer, stage) > lowest
    )
    return 2 * tokens * (forward + backward) + 4 * learnt * shape.hidden * vocabulary


def place(name: str) -> tuple[int, int]:
    """Layer and stage of something trained; a norm, which is in no linear, comes before them."""
    layer = re.search(r"\.(\d+)\.", name)
    stage = next((_STAGES[part] for part in name.split(".") if part in _STAGES), -1)
    return int(layer.group(1)) if layer else -1, stage


def block_shape(model: PreTrainedModel) -> BlockShape | None:
    """The widths of a model's blocks; None where they are not built as these formulas need it."""
    _, blocks = decoder_blocks(model)
    block = blocks[0]
    try:
        query, value = (_widths(block, f"self_attn.{name}") for name in ("q_proj", "v_proj"))
        gate = _widths(block, "mlp.gate_proj")
    except AttributeError:
        return None
    norms = any(is_norm(module) for module in block.get_submodule("self_attn").children())
    return BlockShape(query[0], query[1], value[1], gate[1], norms)


def _widths(block: nn.Module, name: str) -> tuple[int, int]:
    linear = block.get_submodule(name)
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
