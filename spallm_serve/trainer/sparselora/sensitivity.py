"""``sparsity: auto``: how much each layer bears, measured, and what to make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from spallm_serve.trainer.method import Batch
from spallm_serve.trainer.sparselora.blocks import Site, find_sites
from spallm_serve.trainer.sparselora.flops import BlockShape, base_flops, block_shape
from spallm_serve.trainer.sparselora.install import Installed
from spallm_serve.trainer.sparselora.plan import SparsityPlan
from spallm_serve.trainer.sparselora.select import Factors
from spallm_serve.trainer.sparselora.tokens import CurrentBatch, split_batch

# Sparsities tried in each layer, the paper's lowest and highest.
LEVELS = {"mlp": (0.9, 0.99), "self_attn": (0.25, 0.75)}
# What all sparse layers together may add to the loss as a share of it.
LOSS_BUDGET = 0.02


@dataclass(frozen=True)
class Choice:
    """One sparsity that a site can have.

    Attributes:
        sparsity: share of the channels left out.
        increase: of the loss as a share of it, all else dense.
        saving: of the operations a context token takes, in any unit.
    """

    sparsity: float
    increase: float
    saving: float


def candidate_plan(layers: int, level: int) -> SparsityPlan:
    """All layers but the first and the last, which stay dense, at one of the :data:`LEVELS`."""
    inner = range(1, layers - 1)
    mlp, attention = LEVELS["mlp"][level], LEVELS["self_attn"][level]
    return SparsityPlan(
        tuple(mlp if layer in inner else 0.0 for layer in range(layers)),
        tuple(attention if layer in inner else 0.0 for layer in range(layers)),
    )


def measure_choices(
    model: PreTrainedModel,
    sites: Sequence[Site],
    factors: Mapping[str, Factors],
    shape: BlockShape,
    batches: Sequence[Batch],
    loss: Callable[[Batch], torch.Tensor],
) -> dict[str, list[Choice]]:
    """The loss with each site sparse by itself (SparseLoRA, section 3.3, layer sensitivity).

    One forward pass per batch, site and level; nothing is trained, and the model is as it was
    afterwards.

    Args:
        model: frozen, without LoRA, in evaluation mode.
        sites: what may become sparse.
        factors: estimators of all their linears.
        shape: of the blocks.
        batches: with outputs and context.
        loss: of a batch.

    Returns:
        The choices of each site by its name.
    """
    current = CurrentBatch()
    with torch.no_grad():
        dense = [float(loss(batch)) for batch in batches]
    choices: dict[str, list[Choice]] = {site.name: [] for site in sites}
    for level in range(2):
        tried = [replace(site, sparsity=LEVELS[site.kind][level]) for site in sites]
        installed = Installed(tried, factors, current)
        try:
            for site in tried:
                # Only this one is sparse: the others think they are evaluated.
                installed.modules[site.name].training = True
                increase = 0.0
                for batch, reference in zip(batches, dense, strict=True):
                    current.split = split_batch(batch)
                    with torch.no_grad():
                        increase += (float(loss(batch)) / reference - 1) / len(batches)
                installed.modules[site.name].training = False
                kind = {site.kind.replace("self_attn", "attention"): site.sparsity}
                saving = base_flops(shape) - base_flops(shape, **kind)
                choices[site.name].append(Choice(site.sparsity, increase, saving))
        finally:
            installed.remove()
    return choices


def allocate(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, float]:
    """Sparsities that save much and cost at most the budget, the increases taken to add up.

    Greedy: again and again the step, from what a site has to something that saves more, that saves
    most for what it adds to the loss, as long as it fits. An increase below zero counts as none.

    Args:
        choices: of each site by its name.
        budget: of the increases' sum.

    Returns:
        The sparsity of each site; 0 where it stays dense.
    """
    dense = Choice(0.0, 0.0, 0.0)
    chosen = dict.fromkeys(choices, dense)
    left = budget
    while True:
        best: tuple[tuple[float, float], str, Choice, float] | None = None
        for site in sorted(choices):
            for choice in choices[site]:
                gain = choice.saving - chosen[site].saving
                cost = max(choice.increase, 0.0) - max(chosen[site].increase, 0.0)
                if gain <= 0 or cost > left:
                    continue
                worth = (gain / cost if cost > 0 else float("inf"), gain)
                if best is None or worth > best[0]:
                    best = worth, site, choice, cost
        if best is None:
            return {site: choice.sparsity for site, choice in chosen.items()}
        _, site, choice, cost = best
        chosen[site] = choice
        left -= cost


def sensitivity_plan(
    model: PreTrainedModel,
    factors_of: Callable[[Sequence[Site]], Mapping[str, Factors]],
    batches: Sequence[Batch],
    loss: Callable[[Batch], torch.Tensor],
    with_mlp: bool,
) -> SparsityPlan:
    """The plan that a model's own sensitivity suggests.

    Args:
        model: frozen, without LoRA.
        factors_of: gives the estimators of sites.
        batches, loss: see :func:`measure_choices`.
        with_mlp: whether MLPs may become sparse.

    Raises:
        UserError: see :func:`find_sites`.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    sites = find_sites(model, candidate_plan(layers, 0))
    sites = [site for site in sites if with_mlp or site.kind != "mlp"]
    shape = block_shape(model)
    assert shape is not None  # or there would be no sites
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    choices = measure_choices(model, sites, factors_of(sites), shape, batches, loss)
    for module, training in modes:
        module.training = training
    chosen = allocate(choices, LOSS_BUDGET)
    by_kind = {kind: [0.0] * layers for kind in LEVELS}
    for name, sparsity in chosen.items():
        *_, layer, kind = name.split(".")
        by_kind[kind][int(layer)] = sparsity
    return SparsityPlan(tuple(by_kind["mlp"]), tuple(by_kind["self_attn"]))
