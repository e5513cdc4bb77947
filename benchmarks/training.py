"""What a step of each method takes, beside PEFT's LoRA: time, kept activations, operations."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from spallm_serve.batches import ExampleStream, collate
from spallm_serve.benchmarks.quick_base import quick_base
from spallm_serve.benchmarks.records import Record
from spallm_serve.benchmarks.timing import Timing, interleaved
from spallm_serve.benchmarks.tuning import METHODS, parse_run, together
from spallm_serve.errors import UserError
from spallm_serve.heap import return_large_blocks_at_once
from spallm_serve.models import load_model
from spallm_serve.trainer.flops import BlockShape, block_shape, counted_flops, frozen_flops
from spallm_serve.trainer.frozen import inputs_that_take_gradients
from spallm_serve.trainer.gated_mlp import recompute_gated_products
from spallm_serve.trainer.method import Batch, Method, WarmUp
from spallm_serve.trainer.model import LossModel, freeze, prepare_codes
from spallm_serve.trainer.rms_norm import keep_narrow_inputs
from spallm_serve.trainer.run import make_method
from spallm_serve.trainer.settings import parse_train_settings
from spallm_serve.trainer.sparselora.layers import SparseAttention, SparseMlp
from spallm_serve.trainer.sparselora.tokens import split_batch

PEER = "lora"
# How far a run is that every step is timed as part of: its first and last ones are dense.
_ALWAYS_SPARSE = 0.5


@dataclass(frozen=True)
class Variant:
    """A method with its settings on a base.

    Attributes:
        name: shown in the records.
        method: a key of ``tuning.METHODS``.
        bits: of the base; None for a dense one.
        settings: the trainer's.
    """

    name: str
    method: str
    bits: int | None
    settings: dict[str, Any]


@dataclass
class Prepared:
    """A method in a model, with its optimizer, stepping over some batches in turn."""

    model: LossModel
    method: Method
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batches: list[Batch]
    shape: BlockShape | None
    turn: int = 0

    @property
    def last_batch(self) -> Batch:
        """The batch that was stepped over last."""
        return self.batches[(self.turn - 1) % len(self.batches)]

    def formula_flops(self) -> int | None:
        """Operations of a step on the last batch, by formula; attention's are not counted."""
        if self.shape is None:
            return None
        batch = self.last_batch
        config = self.model.config
        layers, vocabulary = config.num_hidden_layers, config.vocab_size
        frozen = frozen_flops(self.shape, layers, self.trained, batch, vocabulary)
        return frozen + self.method.added_flops(batch)

    def choosers(self) -> list[nn.Module]:
        """The layers that choose channels by estimators."""
        kinds = (SparseMlp, SparseAttention)
        return [module for module in self.model.modules() if isinstance(module, kinds)]

    def choose_channels(self, scored: Tensor) -> None:
        """All that estimators do in a step, for activations ``[tokens, width]``."""
        for chooser in self.choosers():
            chooser.choose(scored)  # type: ignore[operator]

    def scored(self) -> Tensor:
        """As many random activations as channels are chosen for in the last batch."""
        split = split_batch(self.last_batch)
        tokens = 0 if split is None else len(split.scored)
        return torch.randn(tokens, self.model.config.hidden_size)

    def backward(self) -> None:
        """Forward and backward pass over the next batch."""
        batch = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        self.method.on_batch(batch, _ALWAYS_SPARSE)
        self.model(**batch)["loss"].backward()

    def step(self) -> None:
        """A whole step of one micro batch."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def parse_variant(text: str, parse_pairs: Any) -> Variant:
    """A variant written as for :func:`~spallm_serve.benchmarks.tuning.parse_run`.

    Raises:
        UserError: written otherwise, or a base that is told more than its bits.
    """
    run = parse_run(text, parse_pairs)
    if run.base is not None and run.base.keys() != {"bits"}:
        raise UserError(f"--variant {text!r}: expected dense or bits=N as the base")
    return Variant(text, run.method, None if run.base is None else run.base["bits"], run.settings)


def training_records(
    model_dir: Path,
    batches: list[Batch],
    variants: list[Variant],
    scratch: Path,
    *,
    dtype: torch.dtype,
    seconds: float,
) -> Iterator[Record]:
    """Steps of all variants in turn, in one process, and of a LoRA of rank 16 on the dense base.

    Args:
        model_dir: the original.
        batches: see :func:`real_batches`.
        variants: what to measure.
        scratch: for compressed bases.
        dtype: of the activations.
        seconds: for all timed steps together.
    """
    console = Console(stderr=True)
    return_large_blocks_at_once()  # as the trainer does
    peer = Variant(PEER, PEER, None, {})
    prepared = {
        variant.name: prepare(
            _base(model_dir, variant.bits, scratch),
            variant.method,
            variant.settings,
            batches,
            dtype,
            stock=variant is peer,
        )
        for variant in (peer, *variants)
    }
    times = interleaved({name: each.step for name, each in prepared.items()}, seconds)
    kept = {name: kept_bytes(each.backward, each.model) for name, each in prepared.items()}
    frozen = _frozen_kept_bytes(model_dir, prepared[PEER].last_batch, dtype)
    flops = {name: counted_flops(each.backward) for name, each in prepared.items()}
    choosing = {name: _choosing_seconds(each) for name, each in prepared.items() if each.choosers()}
    tokens = sum(batch["input_ids"].numel() for batch in batches) / len(batches)
    for variant in variants:
        ours = prepared[variant.name]
        case: dict[str, str | int | float | bool | None] = {
            "variant": variant.name,
            "base": "dense" if variant.bits is None else f"{variant.bits} bits",
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": round(tokens),
            "parameters": sum(parameter.numel() for parameter in ours.trained.values()),
            "peer_parameters": sum(p.numel() for p in prepared[PEER].trained.values()),
            "tokens_per_s": round(tokens / times[variant.name].median, 1),
        }
        yield _time_record(case, times[variant.name], times[PEER])
        kept_case = case | {"kept_by_a_frozen_dense_model": frozen}
        yield _record(kept_case, "kept_activation_bytes", kept[variant.name], kept[PEER])
        yield _record(
            case | {"by_formula": ours.formula_flops()},
            "flops", flops[variant.name], flops[PEER],
        )  # fmt: skip
        if variant.name in choosing:
            share = choosing[variant.name] / times[variant.name].median
            yield Record(bench="training", case=case, metric="estimators_of_a_step", ours=share)
        share = times[variant.name].median / times[PEER].median
        console.print(
            f"{variant.name}: {share:.2f}x LoRA's time, "
            f"{kept[variant.name] / kept[PEER]:.2f}x its activations, "
            f"{flops[variant.name] / flops[PEER]:.2f}x its operations"
        )


def real_batches(
    data: Path, tokenizer: Any, vocabulary: int, *, count: int, rows: int, length: int
) -> list[Batch]:
    """The first batches of a file of rows.

    Args:
        data: JSONL, or a list of rows.
        tokenizer: any; ids beyond the vocabulary are wrapped, for models that have no tokenizer.
        vocabulary: of the model.
        count, rows, length: batches at most, rows in each, tokens in a row at most.
    """
    taken = list(islice(ExampleStream(data, tokenizer, length), count * rows))
    batches = [collate(taken[at : at + rows], 0) for at in range(0, len(taken), rows)]
    for batch in batches:
        batch["input_ids"] %= vocabulary
        batch["labels"] = torch.where(batch["labels"] < 0, batch["labels"], batch["input_ids"])
    return batches


def kept_bytes(function: Callable[[], object], model: nn.Module) -> int:
    """Bytes of what a forward pass keeps for its backward pass, the model's own left out.

    A storage that several operations keep counts once, with the bytes it has when the backward
    pass begins.
    """
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    # Alive until they are counted, or their addresses would be given to others.
    alive: list[Tensor] = []
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if not total and tensor.untyped_storage().data_ptr() not in own:
            alive.append(tensor.detach())
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        if not total:
            storages = [kept.untyped_storage() for kept in alive]
            held = {storage.data_ptr(): storage.nbytes() for storage in storages}
            total.append(sum(held.values()))
            alive.clear()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        function()
    return total[0]


def prepare(
    base: Path,
    method_name: str,
    settings: dict[str, Any],
    batches: list[Batch],
    dtype: torch.dtype,
    *,
    stock: bool = False,
) -> Prepared:
    """A method on a base, ready to step.

    Args:
        base: a model directory.
        method_name: a key of ``tuning.METHODS``.
        settings: the trainer's.
        batches: to step over in turn, and to choose by.
        dtype: of the activations.
        stock: as PEFT trains it, without what our trainer does to hold less.
    """
    told = together(METHODS[method_name], settings)
    with tempfile.TemporaryDirectory() as cache:
        method = make_method(
            parse_train_settings(told | {"base": str(base), "data": "none"}), base, Path(cache)
        )
        lm = load_model(base, dtype)
        freeze(lm)
        shape = block_shape(lm)
        model = LossModel(lm)
        warm_up = WarmUp(
            iter(batches[: method.warm_up_batches]), lambda batch: model(**batch)["loss"]
        )
        trained = method.prepare(lm, method.select(lm, warm_up))
    prepare_codes(lm, dtype)
    if not stock:
        recompute_gated_products(lm, dtype)
        keep_narrow_inputs(lm, dtype)
    model.train()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, weight_decay=0.0, fused=True)
    return Prepared(model, method, trained, optimizer, batches, shape)


def _frozen_kept_bytes(model_dir: Path, batch: Batch, dtype: torch.dtype) -> int:
    """What a model keeps that trains nothing but passes gradients through all its layers."""
    lm = load_model(model_dir, dtype)
    freeze(lm)
    model = LossModel(lm)
    with inputs_that_take_gradients(lm):
        return kept_bytes(lambda: model(**batch)["loss"].backward(), model)


def _choosing_seconds(prepared: Prepared) -> float:
    scored = prepared.scored()

    def choose() -> None:
        prepared.choose_channels(scored)

    return interleaved({"choose": choose}, seconds=1)["choose"].median


def _base(model_dir: Path, bits: int | None, scratch: Path) -> Path:
    if bits is None:
        return model_dir
    return quick_base(model_dir, scratch / f"base-{bits}", {"bits": bits})


def _time_record(case: dict[str, Any], ours: Timing, peer: Timing) -> Record:
    record = _record(case, "step_s", ours.median, peer.median)
    return record.model_copy(update={"runs": ours.runs, "spread": (ours.low, ours.high)})


def _record(case: dict[str, Any], metric: str, ours: float, peer: float) -> Record:
    return Record(
        bench="training",
        case=case,
        metric=metric,
        ours=ours,
        peer=peer,
        peer_name="PEFT LoRA, rank 16, on the dense base",
        ratio=round(peer / ours, 3),
    )
