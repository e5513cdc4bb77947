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
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from spallm_serve.adapter import TENSOR_FILE, Adapter, adapter_digest, write_adapter
from spallm_serve.batches import (
    EndlessStream,
    ExampleStream,
    collate,
    supports_packing,
)
from spallm_serve.errors import UserError
from spallm_serve.identity import base_identity
from spallm_serve.models import load_model, load_tokenizer, resolve_model
from spallm_serve.precision import bfloat16_is_native
from spallm_serve.survey import DataSurvey, survey
from spallm_serve.trainer.loop import MethodTrainer, latest_checkpoint, training_arguments
from spallm_serve.trainer.lut.method import Lut
from spallm_serve.trainer.method import Batch, Method, WarmUp
from spallm_serve.trainer.model import LossModel, freeze
from spallm_serve.trainer.progress import ProgressBar
from spallm_serve.trainer.record import TrainingRecord, machine_name, write_record
from spallm_serve.trainer.run_directory import TrainingDirectory, fingerprint
from spallm_serve.trainer.settings import TrainSettings
from spallm_serve.trainer.smt.method import Smt
from spallm_serve.trainer.sparselora.method import SparseLora

# What a run that is taken up has to have begun with; counts up when results change.
_VERSION = 1


@dataclass(frozen=True)
class Base:
    """An opened base model.

    Attributes:
        name: what the user typed.
        directory: where it is.
        model: frozen, in evaluation mode.
        tokenizer: its tokenizer.
        digest: its identity.
    """

    name: str
    directory: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str


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
    set_seed(settings.seed)
    device = _device(settings)
    processes = PartialState(cpu=device.type == "cpu")
    if not processes.is_main_process:
        console = Console(quiet=True)
    base = open_base(settings, processes.device)
    stream, judged = _streams(settings, base.tokenizer)
    found_data = survey(stream)
    console.print(str(found_data))
    if judged is not None:
        console.print(f"to judge on: {survey(judged)}")
    steps = step_count(settings, found_data.rows, processes.num_processes)
    found = fingerprint(settings, base.digest, _VERSION)
    with processes.main_process_first():
        main = processes.is_main_process
        run = TrainingDirectory(output, found, resume=resume, main=main)
    try:
        return _train(settings, base, stream, judged, found_data, steps, run, output, console)
    finally:
        run.close()


def _train(
    settings: TrainSettings,
    base: Base,
    stream: ExampleStream,
    judged: ExampleStream | None,
    data: DataSurvey,
    steps: int,
    run: TrainingDirectory,
    output: Path,
    console: Console,
) -> Adapter:
    method = make_method(settings, base.directory, run.folder)
    loss_model = LossModel(base.model)
    pad_token_id = pad_token(base.tokenizer)
    selection = run.selection()
    if selection is None:
        batches = _batches(settings, stream, pad_token_id, base.model.device)
        warm_up = WarmUp(
            islice(batches, method.warm_up_batches), lambda batch: loss_model(**batch)["loss"]
        )
        selection = method.select(base.model, warm_up)
        if selection:
            run.save_selection(selection)
    trained = method.prepare(base.model, selection)
    if settings.checkpointing:
        # Not the reentrant form: it gives no gradients below inputs that need none.
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    if isinstance(method, SparseLora):
        first = next(_batches(settings, stream, pad_token_id, base.model.device))
        _say_savings(method, loss_model, first, data, console)
    count = sum(parameter.numel() for parameter in trained.values())
    console.print(
        f"training {count:,} parameters of {len(trained)} tensors for {steps:,} steps of "
        f"{settings.batch_size * settings.accumulation * PartialState().num_processes} rows"
    )
    trainer_of: list[MethodTrainer] = []
    bar = ProgressBar(console, lambda: trainer_of[0].tokens_seen)
    callbacks = [bar, *([EarlyStoppingCallback(settings.patience)] if settings.patience else [])]
    trainer = MethodTrainer(
        method,
        loss_model,
        trained,
        training_arguments(settings, steps, run.folder, base.model.device),
        stream,
        judged,
        pad_token_id,
        callbacks,
    )
    trainer_of.append(trainer)
    trainer.remove_callback(PrinterCallback)  # the bar shows the same
    checkpoint = latest_checkpoint(run.folder)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.stop()
    adapter = method.adapter(base.digest, base.name)
    if trainer.is_world_process_zero():
        write_adapter(adapter, output)
        write_record(
            TrainingRecord(
                settings=settings.model_dump(mode="json"),
                base_digest=base.digest,
                adapter_digest=adapter_digest(adapter),
                adapter_bytes=(output / TENSOR_FILE).stat().st_size,
                parameters=count,
                steps=trainer.state.global_step,
                examples_cut=data.truncated,
                losses=bar.losses,
                eval_losses=bar.eval_losses,
                tokens_per_second=bar.tokens_per_second,
                machine=machine_name(),
            ),
            output,
        )
        run.remove()
        console.print(
            f"[b]{output}[/b]: {adapter.nbytes / 1e6:.2f} MB, {adapter_digest(adapter)[:12]}",
            soft_wrap=True,
        )
    return adapter


def _device(settings: TrainSettings) -> torch.device:
    on_gpu = settings.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def open_base(settings: TrainSettings, device: torch.device) -> Base:
    """Load the base model frozen, in the precision that the settings say.

    Raises:
        UserError: no such model, or one that cannot be packed for or has a shorter context.
    """
    if Path(settings.base).suffix == ".gguf":
        raise UserError(f"{settings.base}: compress it first, spallm-compress reads .gguf files")
    directory = resolve_model(settings.base, Path(settings.base))
    wanted = {"bf16": True, "fp32": False, "auto": bfloat16_is_native(device)}[settings.precision]
    model = load_model(directory, torch.bfloat16 if wanted else torch.float32)
    freeze(model)
    model.to(device)  # type: ignore[arg-type]
    if settings.packing and not supports_packing(model):
        raise UserError(
            f"--packing: {type(model).__name__} does not keep packed examples apart; "
            "train it without"
        )
    tokenizer = load_tokenizer(directory)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and settings.max_length > context:
        raise UserError(
            f"max_length {settings.max_length} is more than the model's context of {context} tokens"
        )
    return Base(settings.base, directory, model, tokenizer, base_identity(model))


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


def _streams(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[ExampleStream, ExampleStream | None]:
    stream = ExampleStream(
        settings.data,
        tokenizer,
        settings.max_length,
        strict=settings.strict,
        seed=settings.seed,
        shuffle_buffer=settings.shuffle_buffer,
        packing=settings.packing,
    )
    if settings.eval_data is None:
        return stream, None
    return stream, ExampleStream(
        settings.eval_data, tokenizer, settings.max_length, strict=settings.strict
    )


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


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; which one does not matter, nothing reads it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _batches(
    settings: TrainSettings, stream: ExampleStream, pad_token_id: int, device: torch.device
) -> Iterator[Batch]:
    """The micro batches of one process, from the first; without end."""
    loader: DataLoader[Batch] = DataLoader(
        EndlessStream(stream),  # type: ignore[arg-type]
        settings.batch_size,
        collate_fn=lambda rows: collate(rows, pad_token_id),
    )
    for batch in loader:
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _say_savings(
    method: SparseLora, model: LossModel, batch: Batch, data: DataSurvey, console: Console
) -> None:
    console.print(f"predicted: {method.savings(data.context_share).why}")
    model.train()
    share = method.measured_share(batch, lambda: model(**batch)["loss"].backward())
    model.zero_grad()
    console.print(f"counted in a sparse step, head and attention included: {share:.0%} of LoRA's")
