"""SpaLLM as a method of the trainer: tables, and norms where wanted, of a compressed base."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.adapter import ROWS, Adapter, LutConfig
from spallm_serve.checkpoint import TABLES
from spallm_serve.errors import UserError
from spallm_serve.layers import SketchedLinear
from spallm_serve.models import is_norm
from spallm_serve.trainer.frozen import inputs_that_take_gradients
from spallm_serve.trainer.lut.layers import TunedLinear, TunedRows
from spallm_serve.trainer.lut.select import row_scores, top_rows
from spallm_serve.trainer.method import Batch, Method, WarmUp
from spallm_serve.trainer.norms import in_float32


class LutSettings(BaseModel):
    """Settings of table training.

    Attributes:
        rows: share of all rows whose tables are trained, those with the largest gradients.
        norms: whether the normalisations are trained, too.
        warm_up_batches: micro batches whose gradients choose the rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: float = Field(default=1.0, gt=0, le=1, description="share of rows to train")
    norms: bool = Field(default=False, description="train normalisations too")
    warm_up_batches: int = Field(default=16, ge=1, description="micro batches that choose the rows")


class Lut(Method):
    """Trains the tables of compressed linears (SpaLLM, section 2.2; SketchTune).

    Codes stay. The gradient of an entry is the sum over all weights that share it.

    Args:
        settings: see :class:`LutSettings`.
    """

    name = "lut"

    def __init__(self, settings: LutSettings) -> None:
        self._settings = settings
        self.warm_up_batches = settings.warm_up_batches if settings.rows < 1 else 0
        self._tuned: dict[str, TunedLinear | TunedRows] = {}
        self._norms: dict[str, nn.Parameter] = {}

    def select(self, model: PreTrainedModel, warm_up: WarmUp) -> dict[str, Tensor]:
        """The rows to train, ``<module>.rows``, where not all are; none are tied to a layer."""
        if self._settings.rows == 1:
            return {}
        layers = _compressed_linears(model)
        probes = {name: TunedLinear(layer) for name, layer in layers.items()}
        for name, probe in probes.items():
            model.set_submodule(name, probe)
        scores = {name: torch.zeros(len(probe.tables)) for name, probe in probes.items()}
        with inputs_that_take_gradients(model):
            for batch in warm_up.batches:
                warm_up.loss(batch).backward()
                for name, probe in probes.items():
                    if probe.tables.grad is not None:
                        scores[name] += row_scores(probe.tables.grad).cpu()
                        probe.tables.grad = None
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        chosen = top_rows(scores, self._settings.rows)
        return {name + ROWS: rows for name, rows in chosen.items()}

    def prepare(
        self, model: PreTrainedModel, selection: dict[str, Tensor]
    ) -> dict[str, nn.Parameter]:
        """Put trainable tables in the place of the base's (see :meth:`Method.prepare`)."""
        for name, layer in _compressed_linears(model).items():
            if self._settings.rows == 1:
                self._tuned[name] = TunedLinear(layer)
            elif name + ROWS in selection:
                self._tuned[name] = TunedRows(layer, selection[name + ROWS])
            else:
                continue
            model.set_submodule(name, self._tuned[name])
        trained = {name + TABLES: tuned.tables for name, tuned in self._tuned.items()}
        if self._settings.norms:
            for name, module in list(model.named_modules()):
                if is_norm(module):
                    for leaf, parameter in in_float32(module).items():
                        self._norms[f"{name}.{leaf}"] = parameter
        return trained | self._norms

    def added_flops(self, batch: Batch) -> int:
        """The tables' gradients: a product as large as the layer's own, or as its chosen rows'."""
        weights = sum(
            tuned.tables.shape[0] * tuned.base.in_features for tuned in self._tuned.values()
        )
        return 2 * batch["labels"].numel() * weights

    def adapter(self, base_digest: str, base_name: str) -> Adapter:
        """The tables in float16 (see :meth:`Method.adapter`)."""
        tensors: dict[str, Tensor] = {}
        for name, tuned in self._tuned.items():
            tables = tuned.tables.detach().half()
            if not bool(torch.isfinite(tables).all()):
                raise UserError(f"{name}: a trained table does not fit in float16; train with less")
            tensors[name + TABLES] = tables
            if isinstance(tuned, TunedRows):
                tensors[name + ROWS] = tuned.rows
        tensors |= {name: norm.detach().float() for name, norm in self._norms.items()}
        config = LutConfig(base_digest=base_digest, base_model_name_or_path=base_name)
        return Adapter(config, tensors)


def _compressed_linears(model: PreTrainedModel) -> dict[str, SketchedLinear]:
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, SketchedLinear)
    }
    if not layers:
        raise UserError(
            "this model is not compressed: tables can only be trained on what spallm-compress "
            "made (or choose --method smt or sparselora)"
        )
    return layers
