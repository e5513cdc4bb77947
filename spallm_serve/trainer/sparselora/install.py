"""Putting sparse layers into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft.tuners.lora import LoraLayer
from torch import nn

from spallm_serve.trainer.sparselora.blocks import Site
from spallm_serve.trainer.sparselora.layers import (
    SparseAttention,
    SparseMlp,
    SparseOutput,
    SparseProjection,
)
from spallm_serve.trainer.sparselora.select import Factors
from spallm_serve.trainer.sparselora.slices import store_by_columns, store_by_rows
from spallm_serve.trainer.sparselora.tokens import CurrentBatch


class Installed:
    """Sparse layers in a model; LoRAs around linears stay around them.

    Args:
        sites: what to make sparse; frozen.
        factors: estimators of all their :attr:`Site.estimated` linears.
        batch: which tells the sparse layers about the batch.
        exact: whether gradients go through the attention's sparse products.

    Attributes:
        modules: the sparse MLPs and attentions by the name of what they serve.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        factors: Mapping[str, Factors],
        batch: CurrentBatch,
        exact: bool = True,
    ) -> None:
        self.modules: dict[str, SparseMlp | SparseAttention] = {}
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._by_columns: list[nn.Linear] = []
        self._attentions: list[nn.Module] = []
        for site in sites:
            own = {name.rpartition(".")[2]: factors[name] for name in site.estimated}
            if site.kind == "mlp":
                self._store_by_columns(site.linears["down_proj"])
                mlp = SparseMlp(site.module, site.sparsity, own, batch)
                self.modules[site.name] = mlp
                self._replace(site.block, "mlp", mlp)
            else:
                self._store_by_columns(site.linears["o_proj"])
                attention = SparseAttention(
                    site.linears, site.head, site.sparsity, own, batch, exact
                )
                self.modules[site.name] = attention
                self._put_branches(site, attention)

    def remove(self) -> None:
        """Make the model what it was, to the layout of its weights."""
        for parent, name, original in self._replaced:
            setattr(parent, name, original)
        for attention in self._attentions:
            del attention.sparse
        for linear in self._by_columns:
            store_by_rows(linear)

    def _put_branches(self, site: Site, attention: SparseAttention) -> None:
        module = site.module
        module.add_module("sparse", attention.train(module.training))
        self._attentions.append(module)
        for name, linear in site.linears.items():
            if name == "o_proj":
                self._replace(module, name, SparseOutput(linear, attention))
            else:
                self._replace(module, name, SparseProjection(linear, name, attention))

    def _replace(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        current: nn.Module = getattr(parent, name)
        if isinstance(current, LoraLayer):
            assert isinstance(current, nn.Module)
            parent, name, current = current, "base_layer", current.get_base_layer()
        self._replaced.append((parent, name, current))
        setattr(parent, name, module.train(current.training))

    def _store_by_columns(self, linear: nn.Module) -> None:
        if isinstance(linear, nn.Linear):
            store_by_columns(linear)
            self._by_columns.append(linear)
