"""Putting sparse layers into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

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
    """Sparse layers in a model, and what was there before.

    Attributes:
        modules: the sparse MLPs and attentions by the name of what they serve.
    """

    def __init__(self) -> None:
        self.modules: dict[str, SparseMlp | SparseAttention] = {}
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._by_columns: list[nn.Linear] = []
        self._attentions: list[nn.Module] = []

    def remove(self) -> None:
        """Make the model what it was, to the layout of its weights."""
        for parent, name, original in self._replaced:
            setattr(parent, name, original)
        for attention in self._attentions:
            del attention.sparse
        for linear in self._by_columns:
            store_by_rows(linear)

    def put_mlp(self, site: Site, sparse: SparseMlp) -> None:
        """Put a sparse MLP in the place of a site's."""
        self.modules[site.name] = sparse
        self._replace(site.block, "mlp", sparse)

    def put_attention(self, site: Site, sparse: SparseAttention) -> None:
        """Put branches that go to a sparse attention in the place of a site's linears."""
        self.modules[site.name] = sparse
        attention = site.module
        attention.add_module("sparse", sparse.train(attention.training))
        self._attentions.append(attention)
        for name, linear in site.linears.items():
            if name == "o_proj":
                self._replace(attention, name, SparseOutput(linear, sparse))
            else:
                self._replace(attention, name, SparseProjection(linear, name, sparse))

    def lay_out(self, linear: nn.Module) -> None:
        """Have the columns of a layer contiguous; those of a sketch are packed when needed."""
        if isinstance(linear, nn.Linear):
            store_by_columns(linear)
            self._by_columns.append(linear)

    def _replace(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        current: Any = getattr(parent, name)
        if isinstance(current, LoraLayer):
            parent, name, current = current, "base_layer", current.get_base_layer()
        self._replaced.append((parent, name, current))
        setattr(parent, name, module.train(current.training))


def install(
    sites: Iterable[Site],
    factors: Mapping[str, Factors],
    batch: CurrentBatch,
    exact: bool = True,
) -> Installed:
    """Make MLPs and attentions sparse; LoRAs around their linears stay around them.

    Args:
        sites: what to make sparse; frozen.
        factors: estimators of all their :attr:`Site.estimated` linears.
        batch: which tells the sparse layers about the batch.
        exact: whether gradients go through the attention's sparse products.
    """
    installed = Installed()
    for site in sites:
        own = {name.rpartition(".")[2]: factors[name] for name in site.estimated}
        if site.kind == "mlp":
            installed.lay_out(site.linears["down_proj"])
            installed.put_mlp(site, SparseMlp(site.module, site.sparsity, own, batch))
        else:
            installed.lay_out(site.linears["o_proj"])
            attention = SparseAttention(site.linears, site.head, site.sparsity, own, batch, exact)
            installed.put_attention(site, attention)
    return installed
