"""``spallm-train`` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from spallm_serve.trainer.cli import app
from spallm_serve.trainer.model import LossModel
from spallm_serve.trainer.settings import commented_config, parse_train_settings
from tests.spallm_serve.trainer.test_run import command, loss_of
from tests.tiny_models import save_tiny, save_tokenizer


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def refused(*arguments: str | Path) -> str:
    code, output = run(*arguments)
    assert code == 2, output
    assert "Traceback" not in output
    return output[output.index("error: ") :]


def small(base: Path, rows: Path, output: Path) -> list[str | Path]:
    return [
        base, "--data", rows, "-o", output, "--steps", "2", "--max-length", "48",
        "--batch-size", "2", "--accumulation", "1", "--set", "precision=fp32",
    ]  # fmt: skip


def test_trains_and_says_where(sketched_base: Path, rows: Path, tmp_path: Path) -> None:
    code, output = run(*small(sketched_base, rows, tmp_path / "adapter"))
    assert code == 0, output
    assert str(tmp_path / "adapter") in output.replace(" ", "")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_printed_configuration_is_the_defaults(tmp_path: Path) -> None:
    code, _ = run("--init-config")
    assert code == 0
    raw = yaml.safe_load(commented_config())
    assert (raw.pop("base"), raw.pop("data")) == ("FILL-IN", "FILL-IN")
    needed = {"base": "b", "data": "d"}
    assert parse_train_settings(raw | needed) == parse_train_settings(needed)
    assert "# None" not in commented_config()


def test_flags_win_over_the_file(sketched_base: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(
        yaml.safe_dump({"base": str(sketched_base), "data": str(rows), "steps": 5, "seed": 3,
                        "batch_size": 2, "max_length": 48, "lut": {"rows": 0.5}})
    )  # fmt: skip
    code, output = run(
        "--config", config, "--steps", "1", "--set", "lut.warm_up_batches=1", "-o", tmp_path / "a"
    )
    assert code == 0, output
    told = json.loads((tmp_path / "a" / "training.json").read_text())["settings"]
    assert (told["steps"], told["seed"], told["lut"]) == (
        1, 3, {"rows": 0.5, "norms": False, "warm_up_batches": 1},
    )  # fmt: skip


def test_preview_trains_nothing(sketched_base: Path, rows: Path, tmp_path: Path) -> None:
    code, output = run(*small(sketched_base, rows, tmp_path / "adapter"), "--preview", "2")
    assert code == 0, output
    assert "assistant" in output.replace(" ", "")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "magic"], "method"),
        (["--set", "lut.rows=2"], "lut.rows"),
        (["--set", "unknown=1"], "unknown"),
        (["--set", "lut"], "KEY=VALUE"),
        (["--set", "seed.x=1", "--seed", "1"], "seed"),
        (["--lr", "0"], "learning_rate"),
        (["--lr", "nan"], "learning_rate"),
        (["--max-length", "4096"], "context of 64 tokens"),
        (["--set", "patience=2"], "eval_data"),
        (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--method", "smt", "--set", "smt.modules=[xyz]"], "xyz"),
        (["--method", "smt", "--set", "smt.blocks=100000"], "blocks"),
        (["--export-peft", "there"], "no form in PEFT"),
        (["--method", "smt", "--export-peft", "there"], "compressed"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_settings_that_are_refused(
    arguments: list[str], said: str, sketched_base: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    assert said in refused(*small(sketched_base, rows, output), *arguments)
    assert not (output / "adapter_config.json").exists()


def test_bases_that_are_refused(dense_base: Path, rows: Path, tmp_path: Path) -> None:
    assert "not compressed" in refused(*small(dense_base, rows, tmp_path / "a"))
    assert "no such directory" in refused(*small(tmp_path / "none", rows, tmp_path / "a"))
    opt = save_tokenizer(save_tiny("opt", tmp_path / "opt"))
    packed = [*small(opt, rows, tmp_path / "a"), "--method", "smt", "--packing"]
    assert "--packing" in refused(*packed, "--set", "smt.modules=[q_proj]")
    gpt2 = save_tokenizer(save_tiny("gpt2", tmp_path / "gpt2"))
    assert "q_proj" in refused(*small(gpt2, rows, tmp_path / "a"), "--method", "sparselora")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("no json\n", ":1: not JSON"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', ":2:"),
        ('{"prompt": "a", "completion": " "}\n', "empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "user"),
    ],
)
def test_data_that_is_refused(content: str, said: str, sketched_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    assert said in refused(*small(sketched_base, path, tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


def test_rows_that_are_too_long(sketched_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 100, "completion": "yes"}) + "\n")
    arguments = small(sketched_base, path, tmp_path / "adapter")
    assert "over the limit of 48" in refused(*arguments, "--strict")
    code, output = run(*arguments, "--no-resume")
    assert code == 0, output
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["examples_cut"]


def test_outputs_that_are_refused(sketched_base: Path, rows: Path, tmp_path: Path) -> None:
    arguments = small(sketched_base, rows, tmp_path / "adapter")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.tex").touch()
    assert "thesis.tex" in refused(*arguments)
    (tmp_path / "adapter" / "thesis.tex").unlink()
    assert run(*arguments)[0] == 0
    assert "finished adapter" in refused(*arguments)
    assert "is a file" in refused(*small(sketched_base, rows, rows))


def test_an_unfinished_run_of_other_settings_is_not_touched(
    sketched_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = small(sketched_base, rows, tmp_path / "adapter")

    forward, calls = LossModel.forward, []

    def interrupted(self: LossModel, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, **batch)

    monkeypatch.setattr(LossModel, "forward", interrupted)
    assert run(*arguments, "--set", "save_every=1")[0] == 130
    monkeypatch.undo()
    assert "--no-resume" in refused(*arguments, "--seed", "9")
    assert run(*arguments, "--seed", "9", "--no-resume")[0] == 0


def test_a_loss_that_is_nan_stops_the_run(
    sketched_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = LossModel.forward, []

    def poisoned(self: LossModel, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        found = forward(self, **batch)
        return {"loss": found["loss"] * (float("nan") if len(calls) == 4 else 1.0)}

    monkeypatch.setattr(LossModel, "forward", poisoned)
    arguments = small(sketched_base, rows, tmp_path / "adapter")
    said = refused(*arguments, "--steps", "8", "--set", "save_every=2")
    assert "nan in step 4" in said
    assert "checkpoint-2" in said.replace(" ", "")
    assert (tmp_path / "adapter" / ".unfinished" / "checkpoint-2" / "complete").exists()


def test_evaluation_and_early_stop(sketched_base: Path, rows: Path, tmp_path: Path) -> None:
    """Who learns numbers unlearns letters: the first state judged stays the best."""
    judged = tmp_path / "letters.jsonl"
    judged.write_text('{"prompt": "1 + 1 =", "completion": " xyz"}\n' * 3)
    arguments = small(sketched_base, rows, tmp_path / "adapter")
    code, output = run(
        *arguments, "--steps", "40", "--eval-data", judged, "--lr", "0.03",
        "--set", "eval_every=2", "--set", "patience=2",
    )  # fmt: skip
    assert code == 0, output
    losses = json.loads((tmp_path / "adapter" / "training.json").read_text())["eval_losses"]
    best = min(losses.values())
    after_best = list(losses.values())[list(losses.values()).index(best) + 1 :]
    assert len(losses) < 20
    assert len(after_best) == 2
    found = loss_of(sketched_base, judged, tmp_path / "adapter")
    assert found == pytest.approx(best, abs=0.02)
    assert abs(found - best) < abs(found - after_best[-1])


def test_killed_and_taken_up(sketched_base: Path, rows: Path, tmp_path: Path) -> None:
    whole, killed = (
        command(sketched_base, rows, tmp_path / name, "--steps", "30")
        for name in ("whole", "killed")
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(killed, env=environment, stdout=subprocess.DEVNULL)
    unfinished = tmp_path / "killed" / ".unfinished"
    deadline = time.monotonic() + 200
    while not list(unfinished.glob("checkpoint-*/complete")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "adapter_config.json").exists()
    subprocess.run(killed, env=environment, check=True, timeout=300)
    code, output = run(*whole[1:])
    assert code == 0, output
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
