"""SparseLoRA as a method of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.adapter import Adapter
from spallm_serve.models import decoder_blocks
from spallm_serve.trainer.flops import block_shape, counted_flops
from spallm_serve.trainer.method import Batch, Method, Savings, WarmUp
from spallm_serve.trainer.sparselora.blocks import Site, check_targets, find_sites
from spallm_serve.trainer.sparselora.estimators import load_estimators
from spallm_serve.trainer.sparselora.flops import base_flops
from spallm_serve.trainer.sparselora.install import install
from spallm_serve.trainer.sparselora.lora import LoraSet
from spallm_serve.trainer.sparselora.plan import SparsityPlan, resolve_plan
from spallm_serve.trainer.sparselora.savings import predict_savings
from spallm_serve.trainer.sparselora.select import Factors
from spallm_serve.trainer.sparselora.sensitivity import sensitivity_plan
from spallm_serve.trainer.sparselora.settings import MLP_LINEARS, SparseLoraSettings
from spallm_serve.trainer.sparselora.tokens import CurrentBatch, context_share, split_batch

_SENSITIVITY_BATCHES = 1
# A share of the steps at which no settings are dense.
_ALWAYS_SPARSE = 0.5


class SparseLora(Method):
    """LoRA whose frozen base computes few channels for context tokens while it is trained.

    What comes out is a plain LoRA. The base is dense for outputs, in the first and the last steps
    and in evaluation.

    Args:
        settings: what the user chose.
        estimator_cache: a ``.safetensors`` file for estimators made here; None keeps none.
        checkpoint_dir: of the base, which may bring estimators; None for none.
    """

    name: ClassVar[str] = "sparselora"

    def __init__(
        self,
        settings: SparseLoraSettings,
        estimator_cache: Path | None = None,
        checkpoint_dir: Path | None = None,
    ) -> None:
        self._settings = settings
        self._cache, self._checkpoint = estimator_cache, checkpoint_dir
        self._current = CurrentBatch()
        self.warm_up_batches = _SENSITIVITY_BATCHES if settings.sparsity == "auto" else 0

    def select(self, model: PreTrainedModel, warm_up: WarmUp) -> dict[str, Tensor]:
        """Measure how sparse each layer can be, if the settings say ``auto``.

        Returns:
            Then ``sparsity.mlp`` and ``sparsity.self_attn``, float64 ``[layers]``; else nothing.

        Raises:
            UserError: the model is not built as sparsity needs it.
        """
        if self._settings.sparsity != "auto":
            return {}
        with_mlp = not set(MLP_LINEARS) & set(self._settings.targets)
        batches = list(warm_up.batches)
        return sensitivity_plan(model, self._factors, batches, with_mlp).tensors()

    def prepare(
        self, model: PreTrainedModel, selection: dict[str, Tensor]
    ) -> dict[str, nn.Parameter]:
        """Put LoRA and sparse layers in (see :meth:`Method.prepare`).

        Dense o_proj and down_proj of sparse layers get their weights laid out by columns.

        Raises:
            UserError: the model lacks a target or is not built as sparsity needs it, or the
                settings name a layer it does not have.
        """
        _, blocks = decoder_blocks(model)
        self._plan = (
            SparsityPlan.from_tensors(selection)
            if selection
            else resolve_plan(self._settings, len(blocks))
        )
        self._shape = block_shape(model)
        sites = find_sites(model, self._plan)
        check_targets(sites, self._settings.targets)
        self._lora = LoraSet(model, self._settings)
        exact = self._settings.context_attn_backward == "exact"
        install(sites, self._factors(sites), self._current, exact)
        self._device = model.device
        return self._lora.parameters()

    def on_batch(self, batch: Batch, share_done: float) -> None:
        """Tell the sparse layers which tokens are context; none in the first and last steps."""
        self._current.split = None
        sparse = self._settings.start <= share_done < 1 - self._settings.end
        if sparse and not self._plan.is_dense:
            here = {name: tensor.to(self._device) for name, tensor in batch.items()}
            self._current.split = split_batch(here)

    def added_flops(self, batch: Batch) -> int:
        """The LoRAs, less what a sparse step leaves out for context; estimators are left out."""
        labels = batch["labels"]
        saved = 0.0
        if self._shape is not None:
            context = context_share(labels) * labels.numel()
            dense = base_flops(self._shape)
            saved = context * sum(
                dense - base_flops(self._shape, *sparsities)
                for sparsities in zip(self._plan.mlp, self._plan.self_attn, strict=True)
            )
        return self._lora.flops() * labels.numel() - round(saved)

    def adapter(self, base_digest: str | None, base_name: str) -> Adapter:
        """A plain LoRA, float32, as PEFT would save it."""
        return self._lora.adapter(base_digest, base_name)

    def savings(self, context_share: float) -> Savings:
        """What a run takes of LoRA's operations in the decoder blocks, by formula.

        Args:
            context_share: of the data's tokens, as :func:`tokens.context_share` counts them.
        """
        dense = self._settings.start + self._settings.end
        return predict_savings(self._shape, self._plan, context_share, dense, self._lora.flops())

    def measured_share(self, batch: Batch, step: Callable[[], object]) -> float:
        """Operations of a step, all of the model's, as a share of the same with plain LoRA.

        Args:
            batch: whose context is computed sparsely.
            step: forward and backward pass over it, the model in training mode.
        """
        self._current.split = None
        dense = counted_flops(step)
        self.on_batch(batch, _ALWAYS_SPARSE)
        return counted_flops(step) / dense

    def _factors(self, sites: Sequence[Site]) -> dict[str, Factors]:
        linears = {name: linear for site in sites for name, linear in site.estimated.items()}
        rank = self._settings.estimator_rank
        return load_estimators(linears, rank, self._checkpoint, self._cache)
