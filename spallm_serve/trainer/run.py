"""A training run from settings to a finished adapter directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, set_seed

from spallm_serve.adapter import Adapter, adapter_digest
from spallm_serve.adapter_files import TENSOR_FILE, write_adapter
from spallm_serve.batches import EndlessStream, ExampleStream, collate
from spallm_serve.heap import return_large_blocks_at_once
from spallm_serve.survey import DataSurvey, survey
from spallm_serve.trainer.base import Base, open_base
from spallm_serve.trainer.curves import curve_callbacks
from spallm_serve.trainer.gated_mlp import recompute_gated_products
from spallm_serve.trainer.loop import MethodTrainer, latest_checkpoint, training_arguments
from spallm_serve.trainer.lut.method import Lut
from spallm_serve.trainer.method import Batch, Method, WarmUp
from spallm_serve.trainer.model import LossModel, prepare_codes
from spallm_serve.trainer.progress import ProgressBar
from spallm_serve.trainer.record import TrainingRecord, machine_name, write_record
from spallm_serve.trainer.rms_norm import keep_narrow_inputs
from spallm_serve.trainer.run_directory import TrainingDirectory, fingerprint
from spallm_serve.trainer.settings import TrainSettings
from spallm_serve.trainer.smt.method import Smt
from spallm_serve.trainer.sparselora.method import SparseLora

# What a run that is taken up has to have begun with; counts up when results change.
_VERSION = 2


@dataclass(frozen=True)
class _Data:
    """Rows to learn and to judge on, and how many there are."""

    stream: ExampleStream
    judged: ExampleStream | None
    survey: DataSurvey
    pad_token_id: int
    batch_size: int

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """Micro batches of one process, from the first; without end."""
        loader: DataLoader[Batch] = DataLoader(
            EndlessStream(self.stream),  # type: ignore[arg-type]
            self.batch_size,
            collate_fn=lambda rows: collate(rows, self.pad_token_id),
        )
        for batch in loader:
            yield {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class _Trained:
    """What came out of the loop."""

    adapter: Adapter
    parameters: int
    steps: int
    bar: ProgressBar


def train(settings: TrainSettings, output: Path, *, resume: bool, console: Console) -> Adapter:
    """Train an adapter and write it.

    A run that was killed goes on from its last checkpoint and ends with the same bytes.

    Args:
        settings: of the run.
        output: the adapter's directory.
        resume: take up an unfinished run in the output.
        console: for progress.

    Raises:
        UserError: settings, data, base and output do not go together; says what to do.
    """
    return_large_blocks_at_once()
    set_seed(settings.seed)
    device = _device(settings)
    processes = PartialState(cpu=device.type == "cpu")
    if not processes.is_main_process:
        console = Console(quiet=True)
    base = open_base(settings, processes.device)
    data = _open_data(settings, base.tokenizer, console)
    steps = step_count(settings, data.survey.rows, processes.num_processes)
    decides = fingerprint(settings, base.digest, _VERSION, processes.num_processes)
    with processes.main_process_first():
        main = processes.is_main_process
        run = TrainingDirectory(output, decides, resume=resume, main=main)
    try:
        found = _train(settings, base, data, steps, run, console)
        if main:
            _write(settings, base, data, found, output)
            run.remove()
    finally:
        run.close()
    console.print(
        f"[b]{output}[/b]: {found.adapter.nbytes / 1e6:.2f} MB, "
        f"{adapter_digest(found.adapter)[:12]}",
        soft_wrap=True,
    )
    return found.adapter


def _train(
    settings: TrainSettings,
    base: Base,
    data: _Data,
    steps: int,
    run: TrainingDirectory,
    console: Console,
) -> _Trained:
    main = PartialState().is_main_process
    callbacks = curve_callbacks(settings.log_to, run.curves) if main else []
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    method = make_method(settings, base.directory, run.folder)
    dtype = base.model.dtype  # what is trained may be of another
    model = LossModel(base.model)
    selection = run.selection()
    if selection is None:
        batches = islice(data.batches(base.model.device), method.warm_up_batches)
        selection = method.select(base.model, WarmUp(batches, lambda batch: model(**batch)["loss"]))
        if selection:
            run.save_selection(selection)
    trained = method.prepare(base.model, selection)
    prepare_codes(base.model, dtype)
    if settings.checkpointing:
        # Not the reentrant form: it gives no gradients below inputs that need none.
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        recompute_gated_products(base.model, dtype)
        keep_narrow_inputs(base.model, dtype)
    if isinstance(method, SparseLora):
        _say_savings(method, model, data, console)
    count = sum(parameter.numel() for parameter in trained.values())
    console.print(
        f"training {count:,} parameters of {len(trained)} tensors for {steps:,} steps of "
        f"{settings.batch_size * settings.accumulation * PartialState().num_processes} rows"
    )
    bar = ProgressBar(console)
    trainer = MethodTrainer(
        method,
        model,
        trained,
        training_arguments(settings, steps, run.folder, base.model.device),
        data.stream,
        data.judged,
        data.pad_token_id,
        bar,
        callbacks,
    )
    checkpoint = latest_checkpoint(run.folder)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.stop()
    return _Trained(method.adapter(base.digest, base.name), count, trainer.state.global_step, bar)


def _write(settings: TrainSettings, base: Base, data: _Data, found: _Trained, output: Path) -> None:
    write_adapter(found.adapter, output)
    record = TrainingRecord(
        settings=settings.model_dump(mode="json"),
        base_digest=base.digest,
        adapter_digest=adapter_digest(found.adapter),
        adapter_bytes=(output / TENSOR_FILE).stat().st_size,
        parameters=found.parameters,
        steps=found.steps,
        examples_cut=data.survey.truncated,
        losses=found.bar.losses,
        eval_losses=found.bar.eval_losses,
        tokens_per_second=found.bar.tokens_per_second,
        machine=machine_name(),
    )
    write_record(record, output)


def _device(settings: TrainSettings) -> torch.device:
    on_gpu = settings.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def make_method(settings: TrainSettings, base: Path, cache: Path) -> Method:
    """The chosen method with its own settings.

    Args:
        settings: of the run.
        base: the base's directory.
        cache: a folder for what a method computes once.
    """
    methods: dict[str, Callable[[], Method]] = {
        "lut": lambda: Lut(settings.lut),
        "smt": lambda: Smt(settings.smt),
        "sparselora": lambda: SparseLora(
            settings.sparselora, cache / "estimators.safetensors", base
        ),
    }
    return methods[settings.method]()


def _open_data(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, console: Console
) -> _Data:
    """All of the data, read once and counted."""
    stream = ExampleStream(
        settings.data,
        tokenizer,
        settings.max_length,
        strict=settings.strict,
        seed=settings.seed,
        shuffle_buffer=settings.shuffle_buffer,
        packing=settings.packing,
    )
    found = survey(stream)
    console.print(str(found))
    judged = None
    if settings.eval_data is not None:
        judged = ExampleStream(
            settings.eval_data, tokenizer, settings.max_length, strict=settings.strict
        )
        console.print(f"to judge on: {survey(judged)}")
    return _Data(stream, judged, found, _pad_token(tokenizer), settings.batch_size)


def step_count(settings: TrainSettings, rows: int, processes: int) -> int:
    """How many optimizer steps the settings ask for.

    Args:
        settings: of the run.
        rows: in a pass over the data.
        processes: that share the rows of a step.
    """
    if settings.steps is not None:
        return settings.steps
    together = settings.batch_size * settings.accumulation * processes
    return math.ceil(settings.epochs * rows / together)


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; which one does not matter, nothing reads it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _say_savings(method: SparseLora, model: LossModel, data: _Data, console: Console) -> None:
    console.print(f"predicted: {method.savings(data.survey.context_share).why}")
    batch = next(data.batches(model.lm.device))
    model.train()
    share = method.measured_share(batch, lambda: model(**batch)["loss"].backward())
    model.zero_grad()
    console.print(f"counted in a sparse step, head and attention included: {share:.0%} of LoRA's")
