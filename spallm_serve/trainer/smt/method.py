"""Sparse Matrix Tuning as a method of fine-tuning, and its adapters put into a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.adapter import BLOCK_INDEX, BLOCKS, Adapter, SmtConfig, expect_kind
from spallm_serve.adapter_structure import check_structure
from spallm_serve.errors import UserError
from spallm_serve.layers import is_linear, weight_shape
from spallm_serve.models import decoder_blocks
from spallm_serve.trainer.flops import place
from spallm_serve.trainer.method import Batch, Method, WarmUp
from spallm_serve.trainer.smt.layers import SmtLinear, check_block_index, grid_shape
from spallm_serve.trainer.smt.select import block_scores, blocks_in_share, select_blocks

# Of all weights in the blocks; what most of SMT's tables are measured at.
DEFAULT_SHARE = 0.0084


class SmtSettings(BaseModel):
    """What Sparse Matrix Tuning can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    block_size: int = Field(default=64, ge=1, le=4096, description="height and width of a block")
    blocks: int | None = Field(default=None, ge=1, description="how many blocks to train")
    share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="how many, as a share of the weights of all linear layers in the decoder "
        f"blocks; {DEFAULT_SHARE} if neither this nor blocks is given",
    )
    modules: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj"),
        min_length=1,
        description="endings of the names of the layers to choose blocks from",
    )
    selection: Literal["global", "per_kind"] = Field(
        default="global",
        description="largest scores of all layers, or as many blocks for each entry of modules",
    )
    warm_up_batches: int = Field(
        default=16, ge=1, description="batches whose gradients are looked at"
    )

    @model_validator(mode="after")
    def _one_amount(self) -> SmtSettings:
        if self.blocks is not None and self.share is not None:
            raise ValueError("give blocks or share, not both")
        return self


@dataclass(frozen=True)
class _Candidate:
    """A layer that blocks may be chosen from, and the entry of ``modules`` it belongs to."""

    module: nn.Module
    kind: str


class Smt(Method):
    """Trains the blocks of the weights with the largest gradients, as deltas on a frozen base.

    SMT, section "Proposed Method". Unlike the paper's warm-up, which fine-tunes the whole model,
    this one only takes gradients: the base stays what everybody shares.

    The backward pass ends at the lowest chosen block, because nothing below requires a gradient.
    The loop must therefore not make the embeddings' output require one.

    Args:
        settings: what to train, and how much of it.
    """

    name = "smt"

    def __init__(self, settings: SmtSettings) -> None:
        self._settings = settings
        self.warm_up_batches = settings.warm_up_batches
        self._layers: dict[str, SmtLinear] = {}

    def select(self, model: PreTrainedModel, warm_up: WarmUp) -> dict[str, Tensor]:
        """See :meth:`Method.select`.

        Returns:
            ``<module>.block_index`` int32 ``[m, 2]`` of every module with chosen blocks.

        Raises:
            UserError: no layer matches, more blocks asked for than there are, or a gradient that is
                zero everywhere or not finite.
        """
        size = self._settings.block_size
        candidates = _candidates(model, self._settings.modules)
        count = self._block_count(model, candidates)
        scores = {
            name: torch.zeros(grid_shape(candidate.module, size), device=model.device)
            for name, candidate in candidates.items()
        }
        with _scoring(candidates, scores, size):
            for batch in warm_up.batches:
                # The loss is not kept: its graph holds the layers' inputs.
                warm_up.loss(batch).backward()
        total = sum(float(score.sum()) for score in scores.values())
        if not 0 < total < float("inf"):
            raise UserError(
                f"warm-up: the gradients' magnitudes add up to {total}; "
                "look for loss tokens in the data, and for NaN in the loss"
            )
        per_kind = {name: candidate.kind for name, candidate in candidates.items()}
        kinds = per_kind if self._settings.selection == "per_kind" else None
        chosen = select_blocks(scores, count, kinds)
        return {name + BLOCK_INDEX: index.cpu() for name, index in chosen.items()}

    def _block_count(self, model: PreTrainedModel, candidates: Mapping[str, _Candidate]) -> int:
        size = self._settings.block_size
        grids = [grid_shape(candidate.module, size) for candidate in candidates.values()]
        available = sum(rows * columns for rows, columns in grids)
        count = self._settings.blocks
        if count is None:
            shapes = [weight_shape(linear) for linear in _linears(model).values()]
            parameters = sum(rows * columns for rows, columns in shapes)
            count = blocks_in_share(parameters, self._settings.share or DEFAULT_SHARE, size)
        if count > available:
            raise UserError(
                f"{count} blocks of {size} x {size} are asked for, and the layers that end in "
                f"{', '.join(self._settings.modules)} have {available}; ask for fewer or name more"
            )
        return count

    def prepare(
        self, model: PreTrainedModel, selection: dict[str, Tensor]
    ) -> dict[str, nn.Parameter]:
        """See :meth:`Method.prepare`; the parameters are ``<module>.blocks``."""
        indices = {name.removesuffix(BLOCK_INDEX): index for name, index in selection.items()}
        self._layers = _insert(model, indices, self._settings.block_size)
        return {name + BLOCKS: layer.blocks for name, layer in self._layers.items()}

    def added_flops(self, batch: Batch) -> int:
        """Each block forward, its gradient, and its input's but for the lowest layers."""
        lowest = min(place(name) for name in self._layers)
        entries = sum(
            _entries(layer, with_input=place(name) > lowest) for name, layer in self._layers.items()
        )
        return 2 * batch["labels"].numel() * entries

    def adapter(self, base_digest: str, base_name: str) -> Adapter:
        """See :meth:`Method.adapter`: float16 blocks and where they lie.

        Raises:
            UserError: a value is beyond float16.
        """
        tensors: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            half = layer.blocks.detach().to(torch.float16)
            if not bool(torch.isfinite(half).all()):
                raise UserError(
                    f"{name}: a trained value is not finite in float16; lower the learning rate"
                )
            tensors[name + BLOCKS] = half
            tensors[name + BLOCK_INDEX] = layer.block_index
        config = SmtConfig(
            base_digest=base_digest,
            base_model_name_or_path=base_name,
            block_size=self._settings.block_size,
        )
        return Adapter(config, tensors)


def _entries(layer: SmtLinear, with_input: bool) -> int:
    """Multiplications a token takes in a layer's blocks; ragged ones are cut where they are."""
    size = layer.block_size
    corner = torch.tensor(weight_shape(layer.base)) - layer.block_index.cpu() * size
    rows, columns = corner.clamp(max=size).sum(0).tolist()
    return size * (rows + len(corner) * size + (columns if with_input else 0))


def attach(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put an adapter's blocks into a model, for inference.

    Args:
        model: the base it was trained on; its layers are replaced in place.
        adapter: of kind SPALLM_SMT.

    Raises:
        UserError: another kind, a module the model does not have as a linear layer, blocks of
            another shape, out of range or given twice; the model is as it was then.
    """
    config = expect_kind(adapter, SmtConfig, "blocks cannot be attached")
    check_structure(adapter)
    indices = {name: adapter.tensors[name + BLOCK_INDEX] for name in adapter.modules(BLOCKS)}
    for name, layer in _insert(model, indices, config.block_size).items():
        layer.blocks.requires_grad_(False).copy_(adapter.tensors[name + BLOCKS])


def _insert(
    model: PreTrainedModel, indices: Mapping[str, Tensor], size: int
) -> dict[str, SmtLinear]:
    """Put layers with blocks of zeros in the place of linear ones: all, or none if one is wrong."""
    linears = _linears(model)
    for name, index in indices.items():
        if name not in linears:
            raise UserError(f"{name}: the model has no such linear layer in its decoder blocks")
        check_block_index(index, linears[name], size, name + BLOCK_INDEX)
    layers = {name: SmtLinear(linears[name], index, size) for name, index in indices.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def _linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All linear layers of the decoder blocks by their name in the model."""
    prefix, blocks = decoder_blocks(model)
    return {
        name: module for name, module in blocks.named_modules(prefix=prefix) if is_linear(module)
    }


def _candidates(model: PreTrainedModel, endings: tuple[str, ...]) -> dict[str, _Candidate]:
    linears = _linears(model)
    found: dict[str, _Candidate] = {}
    for name, module in linears.items():
        for ending in endings:
            if f".{name}".endswith(f".{ending}"):
                found[name] = _Candidate(module, ending)
                break
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in found):
            there = sorted({name.rpartition(".")[2] for name in linears})
            raise UserError(
                f"modules: no linear layer ends in {ending!r}; this model's are {', '.join(there)}"
            )
    return found


@contextmanager
def _scoring(
    candidates: Mapping[str, _Candidate], scores: Mapping[str, Tensor], size: int
) -> Iterator[None]:
    """Meanwhile every backward pass adds the candidates' block scores to ``scores``."""

    def watch(score: Tensor) -> Any:
        def on_forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            # In a frozen model nothing asks for a gradient: the lowest candidates start it, and
            # nothing below them is computed.
            if not output.requires_grad:
                output.requires_grad_()
            x = inputs[0].detach()

            def on_gradient(dy: Tensor) -> None:
                score.add_(block_scores(dy.flatten(0, -2), x.flatten(0, -2), size))

            output.register_hook(on_gradient)

        return on_forward

    hooks = [
        candidate.module.register_forward_hook(watch(scores[name]))
        for name, candidate in candidates.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
