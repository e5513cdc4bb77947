"""``sparsity: auto``: how much each layer bears, measured on the user's own data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from spallm_serve.trainer.flops import BlockShape, block_shape
from spallm_serve.trainer.method import Batch
from spallm_serve.trainer.sparselora.allocation import Choice, allocate
from spallm_serve.trainer.sparselora.blocks import Site, find_sites
from spallm_serve.trainer.sparselora.flops import base_flops
from spallm_serve.trainer.sparselora.install import install
from spallm_serve.trainer.sparselora.plan import SparsityPlan
from spallm_serve.trainer.sparselora.select import Factors
from spallm_serve.trainer.sparselora.tokens import CurrentBatch, dense_tokens, split_batch

# Sparsities tried in each layer, from the range of the paper's.
LEVELS = {"mlp": (0.9, 0.99), "self_attn": (0.25, 0.75)}
# How far the untrained model may move: KL divergence at the outputs, nats per token.
LIMIT = 0.1
# Outputs compared; their predictions are kept.
_COMPARED_TOKENS = 256
_TIGHTENINGS = 8


class DenseReference:
    """What a dense model predicts for some batches.

    Divergence from that, and not the loss, is what layers are judged by: of single layers the loss
    moves as often down as up, by up to 2 % on SmolLM2-135M, and all layers that seem harmless by it
    raise it by a third together.

    Args:
        model: in evaluation mode.
        batches: with outputs.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = [
            {name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches
        ]
        self._dense = [self._predictions(batch) for batch in self._batches]

    def divergence(self, current: CurrentBatch) -> float:
        """KL divergence of the dense predictions from the model's now, nats per output token.

        Args:
            current: which tells the model's sparse layers about the batch.
        """
        total, count = 0.0, 0
        for batch, dense in zip(self._batches, self._dense, strict=True):
            current.split = split_batch(batch)
            found = self._predictions(batch)
            total += float(F.kl_div(found, dense, reduction="sum", log_target=True))
            count += len(dense)
        return max(total / max(count, 1), 0.0)

    @torch.no_grad()
    def _predictions(self, batch: Batch) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        # Without a cache, or packed rows would not be kept apart.
        logits: Tensor = self._model(**inputs, use_cache=False).logits
        outputs = dense_tokens(batch["labels"]).flatten().nonzero().squeeze(1)
        outputs = outputs[:: -(-len(outputs) // _COMPARED_TOKENS) or 1]
        return logits.flatten(0, 1)[outputs].float().log_softmax(-1)


def candidate_plan(layers: int, level: int) -> SparsityPlan:
    """All layers but the first and the last, which stay dense, at one of the :data:`LEVELS`."""
    inner = range(1, layers - 1)
    mlp, attention = LEVELS["mlp"][level], LEVELS["self_attn"][level]
    return SparsityPlan(
        tuple(mlp if layer in inner else 0.0 for layer in range(layers)),
        tuple(attention if layer in inner else 0.0 for layer in range(layers)),
    )


def measure_choices(
    sites: Sequence[Site],
    factors: Mapping[str, Factors],
    shape: BlockShape,
    reference: DenseReference,
) -> dict[str, list[Choice]]:
    """What each site costs, sparse by itself (SparseLoRA, section 3.3, layer sensitivity).

    One forward pass per batch, site and level; nothing is trained, and the model is as it was
    afterwards.

    Args:
        sites: what may become sparse, in a frozen model without LoRA, in evaluation mode.
        factors: estimators of all their linears.
        shape: of the blocks.
        reference: of the model.

    Returns:
        The choices of each site by its name.
    """
    choices: dict[str, list[Choice]] = {site.name: [] for site in sites}
    for level in range(2):
        tried = [replace(site, sparsity=LEVELS[site.kind][level]) for site in sites]
        current = CurrentBatch()
        installed = install(tried, factors, current)
        try:
            for site in tried:
                # Only this one is sparse: the others take it for evaluation.
                installed.modules[site.name].training = True
                cost = reference.divergence(current)
                installed.modules[site.name].training = False
                choices[site.name].append(Choice(site.sparsity, cost, _saving(shape, site)))
        finally:
            installed.remove()
    return choices


def measure_together(
    sites: Sequence[Site], factors: Mapping[str, Factors], reference: DenseReference
) -> float:
    """The divergence of a model with all sites sparse (arguments: :func:`measure_choices`)."""
    current = CurrentBatch()
    installed = install(sites, factors, current)
    try:
        for module in installed.modules.values():
            module.training = True
        return reference.divergence(current)
    finally:
        installed.remove()


def sensitivity_plan(
    model: PreTrainedModel,
    factors_of: Callable[[Sequence[Site]], Mapping[str, Factors]],
    batches: Sequence[Batch],
    with_mlp: bool,
    limit: float = LIMIT,
) -> SparsityPlan:
    """The plan that a model's own sensitivity suggests.

    Costs of single layers do not quite add up, so what they suggest together is measured, and the
    budget lowered until it keeps to the limit.

    Args:
        model: frozen, without LoRA; afterwards it is as it was.
        factors_of: gives the estimators of sites.
        batches: with outputs and context.
        with_mlp: whether MLPs may become sparse.
        limit: divergence the whole plan may cause, nats per output token.

    Raises:
        UserError: see :func:`find_sites`.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    sites = find_sites(model, candidate_plan(layers, 0))
    sites = [site for site in sites if with_mlp or site.kind != "mlp"]
    shape = block_shape(model)
    if shape is None or not sites:
        return _plan({}, layers)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        factors = factors_of(sites)
        reference = DenseReference(model, batches)
        choices = measure_choices(sites, factors, shape, reference)
        chosen = _within(limit, sites, choices, factors, reference)
    finally:
        for module, training in modes:
            module.training = training
    return _plan(chosen, layers)


def _within(
    limit: float,
    sites: Sequence[Site],
    choices: Mapping[str, Sequence[Choice]],
    factors: Mapping[str, Factors],
    reference: DenseReference,
) -> dict[str, float]:
    """Sparsities by site that together keep to the limit; none where no budget tried does."""
    budget = limit
    for _ in range(_TIGHTENINGS):
        chosen = allocate(choices, budget)
        tried = [replace(s, sparsity=chosen[s.name]) for s in sites if chosen[s.name]]
        divergence = measure_together(tried, factors, reference)
        if divergence <= limit:
            return chosen
        budget *= min(0.8, limit / divergence)
    return dict.fromkeys(choices, 0.0)


def _saving(shape: BlockShape, site: Site) -> float:
    sparse = {"mlp" if site.kind == "mlp" else "attention": site.sparsity}
    return base_flops(shape) - base_flops(shape, **sparse)


def _plan(chosen: Mapping[str, float], layers: int) -> SparsityPlan:
    by_kind = {kind: [0.0] * layers for kind in LEVELS}
    for name, sparsity in chosen.items():
        *_, layer, kind = name.split(".")
        by_kind[kind][int(layer)] = sparsity
    return SparsityPlan(tuple(by_kind["mlp"]), tuple(by_kind["self_attn"]))
