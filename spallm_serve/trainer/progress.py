"""What a person sees of a run: a bar with loss, speed and time left."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Shows each step's loss and the tokens a second; remembers all losses.

    Args:
        console: where to.

    Attributes:
        tokens: that this process has run so far; counted by the loop.
        losses: step -> training loss.
        eval_losses: step -> loss on the rows to judge on.
    """

    def __init__(self, console: Console) -> None:
        self.tokens = 0
        self.losses: dict[int, float] = {}
        self.eval_losses: dict[int, float] = {}
        self._started = 0.0
        self._judged = ""
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, shown="")

    @property
    def tokens_per_second(self) -> float:
        """Over all steps of this process, checkpoints and evaluations included."""
        return self.tokens / max(time.perf_counter() - self._started, 1e-9)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The bar begins where a run that was stopped had come to."""
        self._started = time.perf_counter()
        for entry in state.log_history:
            self._remember(entry)
        if state.is_world_process_zero:
            self._bar.start()
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """A step's loss, or an evaluation's."""
        self._remember({"step": state.global_step} | (logs or {}))
        if logs and "eval_loss" in logs:
            self._judged = f"  held out {logs['eval_loss']:.3f}"
        if logs and "loss" in logs:
            shown = f"loss {logs['loss']:.3f}{self._judged}  {self.tokens_per_second:,.0f} tokens/s"
            self._bar.update(self._task, completed=state.global_step, shown=shown)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The bar stays as it is."""
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, also after an error."""
        self._bar.stop()

    def _remember(self, entry: dict[str, Any]) -> None:
        step = int(entry["step"])
        if "loss" in entry:
            self.losses[step] = float(entry["loss"])
        if "eval_loss" in entry:
            self.eval_losses[step] = float(entry["eval_loss"])
