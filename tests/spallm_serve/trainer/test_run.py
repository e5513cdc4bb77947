"""Whole training runs on tiny models: what comes out, resuming, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from spallm_serve.adapted import apply_adapter
from spallm_serve.adapter import adapter_digest
from spallm_serve.adapter_files import read_adapter
from spallm_serve.batches import ExampleStream, collate
from spallm_serve.errors import UserError
from spallm_serve.models import load_model, load_tokenizer
from spallm_serve.trainer.model import LossModel
from spallm_serve.trainer.run import train
from spallm_serve.trainer.settings import TrainSettings, parse_train_settings

METHODS = ("lut", "smt", "sparselora")


def settings(base: Path, rows: Path, method: str = "lut", **more: Any) -> TrainSettings:
    small = {
        "base": str(base), "data": str(rows), "method": method, "steps": 6, "batch_size": 2,
        "accumulation": 2, "max_length": 48, "precision": "fp32", "save_every": 2,
        "warm_up_steps": 1, "smt": {"block_size": 8, "blocks": 6, "warm_up_batches": 2},
        "sparselora": {"rank": 4, "sparsity": {"layers.1.mlp": 0.5}},
    }  # fmt: skip
    return parse_train_settings(small | more)


def quiet() -> Console:
    return Console(quiet=True)


def loss_of(base: Path, rows: Path, adapter: Path | None = None) -> float:
    model = load_model(base)
    if adapter is not None:
        apply_adapter(model, read_adapter(adapter))
    stream = ExampleStream(rows, load_tokenizer(base), 48)
    with torch.no_grad():
        return float(LossModel(model)(**collate(list(stream), 0))["loss"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dense", "sketched"])
def test_training_lowers_the_loss_of_what_is_read_back(
    method: str, kind: str, dense_base: Path, sketched_base: Path, rows: Path, tmp_path: Path
) -> None:
    if (method, kind) == ("lut", "dense"):
        pytest.skip("tables are only there to train on a compressed base")
    base = dense_base if kind == "dense" else sketched_base
    run = settings(base, rows, method, steps=20, learning_rate=3e-3)
    train(run, tmp_path / "adapter", resume=True, console=quiet())
    before, after = loss_of(base, rows), loss_of(base, rows, tmp_path / "adapter")
    assert after < before - 0.05
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "training.json",
    ]  # fmt: skip
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert record["adapter_digest"] == adapter_digest(read_adapter(tmp_path / "adapter"))
    assert len(record["losses"]) == 20


class Killed(BaseException):
    """In the place of a signal."""


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    method: str, sketched_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(sketched_base, rows, method, epochs=1, steps=None)
    train(run, tmp_path / "whole", resume=True, console=quiet())
    forward = LossModel.forward
    calls = 0

    def failing(self: LossModel, **batch: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise Killed
        return forward(self, **batch)

    monkeypatch.setattr(LossModel, "forward", failing)
    with pytest.raises(Killed):
        train(run, tmp_path / "stopped", resume=True, console=quiet())
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "adapter_config.json").exists()
    train(run, tmp_path / "stopped", resume=True, console=quiet())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        wanted = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "stopped" / name).read_bytes() == wanted


def command(base: Path, rows: Path, output: Path, *more: str) -> list[str]:
    """``spallm-train`` with small settings, for a process of its own."""
    return [
        str(Path(sys.executable).with_name("spallm-train")), str(base), "--data", str(rows),
        "-o", str(output), "--steps", "6", "--max-length", "48", "--set", "precision=fp32",
        "--set", "warm_up_steps=1", "--set", "save_every=2", *more,
    ]  # fmt: skip


def test_two_processes_train_what_one_does(sketched_base: Path, rows: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    train(settings(sketched_base, rows), tmp_path / "1", resume=True, console=quiet())
    own = command(sketched_base, rows, tmp_path / "2", "--batch-size", "1", "--accumulation", "2")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([sys.executable, *launcher, *own], check=True, env=environment, timeout=300)
    one, two = (read_adapter(tmp_path / name) for name in ("1", "2"))
    assert one.tensors.keys() == two.tensors.keys()
    before = load_model(sketched_base).state_dict()
    for name, tensor in one.tensors.items():
        # Steps of Adam's first moments are as long as the rate for the smallest gradients, too.
        torch.testing.assert_close(two.tensors[name], tensor, rtol=2e-3, atol=1e-3)
        assert float((tensor - before[name]).abs().mean()) > 1e-3


def test_curves_stay_when_the_run_is_finished(
    sketched_base: Path, rows: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = settings(sketched_base, rows, log_to="tensorboard")
    train(run, tmp_path / "adapter", resume=True, console=quiet())
    events = EventAccumulator(str(tmp_path / "adapter" / "runs")).Reload()
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == pytest.approx({int(step): loss for step, loss in record["losses"].items()})


def test_curves_without_their_package_are_refused(
    sketched_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = settings(sketched_base, rows, log_to="wandb")
    with pytest.raises(UserError, match="wandb is not installed"):
        train(run, tmp_path / "adapter", resume=True, console=quiet())
    assert not (tmp_path / "adapter").exists()
