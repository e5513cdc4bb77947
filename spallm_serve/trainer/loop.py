"""transformers' Trainer around a method: what is trained, saved and measured is the method's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from spallm_serve.batches import EndlessStream, ExampleStream, collate
from spallm_serve.errors import UserError
from spallm_serve.examples import IGNORED
from spallm_serve.trainer.method import Batch, Method
from spallm_serve.trainer.model import LossModel
from spallm_serve.trainer.progress import ProgressBar
from spallm_serve.trainer.settings import TrainSettings

TRAINED_FILE = "trained.safetensors"
COMPLETE_FILE = "complete"


class MethodTrainer(Trainer):  # type: ignore[misc]
    """Runs the loop: accumulation, schedule, clipping, checkpoints, logging, data parallelism.

    Args:
        method: prepared.
        model: with the trainable parts in place.
        trained: what is trained, by name.
        arguments: see :func:`training_arguments`.
        stream: rows to learn.
        judged: rows to judge on, or None.
        pad_token_id: for batches.
        bar: shows how it goes.
        callbacks: more of transformers'.
    """

    control: Any  # transformers is not analysed

    def __init__(
        self,
        method: Method,
        model: LossModel,
        trained: dict[str, nn.Parameter],
        arguments: TrainingArguments,
        stream: ExampleStream,
        judged: ExampleStream | None,
        pad_token_id: int,
        bar: ProgressBar,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self._method, self._trained, self._judged = method, trained, judged
        self._pad_token_id = pad_token_id
        self._bar = bar
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=EndlessStream(stream),
            eval_dataset=judged,
            data_collator=self._collate,
            callbacks=[bar, *callbacks],
        )
        self.remove_callback(PrinterCallback)  # the bar shows the same

    def _collate(self, rows: list[Any]) -> Batch:
        return collate(rows, self._pad_token_id)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro batch, its share of the step's.

        Raises:
            UserError: it is NaN or infinite.
        """
        self._method.on_batch(inputs, self.state.global_step / self.state.max_steps)
        self._bar.tokens += inputs["input_ids"].numel()
        loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            kept = latest_checkpoint(Path(str(self.args.output_dir)))
            raise UserError(
                f"the loss became {float(loss.detach())} in step {self.state.global_step + 1} "
                f"({_content(inputs)}); a lower --learning-rate may help. "
                + (f"The last good state is kept: {kept}" if kept else "Nothing was saved yet")
            )
        return loss

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss over all tokens of the rows to judge on, ``eval_loss``."""
        assert self._judged is not None
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self._own_batches(self._judged):
            tokens = (batch["labels"] != IGNORED).sum()
            on_device = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            total[0] += model(**on_device)["loss"] * tokens
            total[1] += tokens
        model.train(was_training)
        summed = self.accelerator.reduce(total, "sum").tolist()
        metrics = {"eval_loss": summed[0] / max(summed[1], 1)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _own_batches(self, stream: ExampleStream) -> Any:
        """Every batch of a stream that is this process's turn."""
        rows: list[Any] = []
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        for number, row in enumerate(stream):
            if number // size % world == self.args.process_index:
                rows.append(row)
            if len(rows) == size:
                yield self._collate(rows)
                rows = []
        if rows:
            yield self._collate(rows)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu() for name, value in self._trained.items()}
        save_file(tensors, folder / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(saved[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            # Last, so that a checkpoint cut short by a kill is not taken for one.
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE_FILE).touch()


def _content(batch: Batch) -> str:
    rows, tokens = batch["input_ids"].shape
    return f"a batch of {rows} rows of {tokens} tokens, the first begins with token ids " + str(
        batch["input_ids"][0, :8].tolist()
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run that was written to its end."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def training_arguments(
    settings: TrainSettings, steps: int, folder: Path, device: torch.device
) -> TrainingArguments:
    """transformers' arguments for our settings.

    Args:
        settings: of the run.
        steps: optimizer steps.
        folder: for checkpoints.
        device: ``cpu`` keeps even a machine with GPUs on its processor.
    """
    judging = settings.eval_data is not None
    # The best state has to be among the checkpoints when training stops early.
    save_every = settings.eval_every if settings.patience else settings.save_every
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.peak_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=min(settings.warm_up_steps, math.ceil(steps / 2)),
        max_grad_norm=settings.clip,
        weight_decay=0.0,
        adam_beta2=settings.adam_beta2,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        eval_strategy="steps" if judging else "no",
        eval_steps=settings.eval_every if judging else None,
        load_best_model_at_end=settings.patience is not None,
        metric_for_best_model="eval_loss" if judging else None,
        greater_is_better=False if judging else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        # Each process reads all rows and takes its share: rows of several lengths make no batch.
        accelerator_config={"dispatch_batches": False, "split_batches": False},
        ddp_find_unused_parameters=False,
    )
