"""``spallm-compress`` as a user meets it: bad input is one line, exit code 2, nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from spallm_serve.compressor.cli import app
from tests.tiny_models import save_tiny, save_tokenizer

QUICK = ["--samples", "2", "--seqlen", "16", "--estimator-rank", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", shard_size="40KB")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def compress(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def refused(output: Path, *arguments: str | Path) -> str:
    """Run what must be refused; returns its message."""
    code, text = compress(*arguments, "-o", output)
    assert code == 2, text
    assert "Traceback" not in text
    message = text[text.index("error:") :]
    assert message.strip().count("\n") == 0, message
    assert not (output / "config.json").exists()
    return message


def first_shard(model: Path) -> Path:
    return sorted(model.glob("model-*.safetensors"))[0]


def test_compresses_and_says_where(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, text = compress(source, "--bits", "3", *QUICK, "-o", output)
    assert code == 0, text
    assert "spallm_report.html" in text
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "estimators.safetensors"} <= names
    assert not (output / ".unfinished").exists()
    quantization = json.loads((output / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "spallm"
    assert quantization["skipped"] == ["lm_head"]


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, text = compress(source, "--bits", "2", "--dry-run", *QUICK, "-o", output)
    assert code == 0, text
    assert "nothing was written" in text
    assert not output.exists()


def test_not_a_model(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "out", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "out", tmp_path / "empty")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF not really")
    assert "GGUF" in refused(tmp_path / "out", tmp_path / "broken.gguf")


def test_not_a_causal_language_model(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "clip")
    raw = json.loads((tmp_path / "clip" / "config.json").read_text())
    raw["model_type"] = "clip"
    (tmp_path / "clip" / "config.json").write_text(json.dumps(raw))
    assert "not a causal language model" in refused(tmp_path / "out", tmp_path / "clip")


def test_missing_shard(copy: Path, tmp_path: Path) -> None:
    first_shard(copy).unlink()
    assert "shard is missing" in refused(tmp_path / "out", copy)


def test_truncated_shard(copy: Path, tmp_path: Path) -> None:
    shard = first_shard(copy)
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refused(tmp_path / "out", copy)
    assert "truncated" in message
    assert shard.name in message


def test_index_that_leads_outside(copy: Path, tmp_path: Path) -> None:
    index = copy / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"] = {name: "../tiny/" + file for name, file in raw["weight_map"].items()}
    index.write_text(json.dumps(raw))
    assert "not a plain file name" in refused(tmp_path / "out", copy)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(copy: Path, tmp_path: Path, poison: float) -> None:
    shard = next(path for path in copy.glob("*.safetensors") if "up_proj" in str(load_file(path)))
    tensors = load_file(shard)
    name = next(key for key in tensors if "up_proj.weight" in key)
    tensors[name][3, 5] = poison
    save_file(tensors, shard, metadata={"format": "pt"})
    assert name in refused(tmp_path / "out", copy, *QUICK)


def test_calibration_text(copy: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 5)
    assert "tokenizer" in refused(output, copy, "--calibration", text)
    save_tokenizer(copy)
    assert "no such file" in refused(output, copy, "--calibration", tmp_path / "absent.txt")
    assert "shorter than one window" in refused(output, copy, "--calibration", text)
    text.write_text("")
    assert "is empty" in refused(output, copy, "--calibration", text)
    assert not output.exists()


def test_groups_that_do_not_divide_a_width(source: Path, tmp_path: Path) -> None:
    message = refused(tmp_path / "out", source, "--groups-per-row", "8", *QUICK)
    assert "q_proj" in message
    assert "36" in message
    assert "6 does" in message


def test_patterns_that_match_nothing(source: Path, tmp_path: Path) -> None:
    assert "'*.nothing'" in refused(tmp_path / "out", source, "--skip", "*.nothing")
    assert "'x*'" in refused(tmp_path / "out", source, "--bits-for", "x*=2")
    assert "GLOB=BITS" in refused(tmp_path / "out", source, "--bits-for", "x*=7")


def test_output_that_holds_something_else(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    code, text = compress(source, *QUICK, "-o", output)
    assert code == 2
    assert "something else" in text
    assert [path.name for path in output.iterdir()] == ["precious.txt"]


def test_unfinished_run_of_other_settings_is_not_touched(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    state = output / ".unfinished"
    state.mkdir(parents=True)
    (state / "fingerprint").write_text("another")
    assert "other settings" in refused(output, source, *QUICK)
    code, text = compress(source, "--no-resume", *QUICK, "-o", output)
    assert code == 0, text


def test_no_disk_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "disk space" in refused(tmp_path / "out", source, *QUICK)
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_disk_that_fills_up_keeps_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import spallm_serve.compressor.publish as publish

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(publish, "write_shards", full)
        assert "no space left" in refused(output, source, *QUICK)
    code, text = compress(source, *QUICK, "-o", output)
    assert code == 0, text
    assert "3 blocks were done" in text


def test_cholesky_that_always_fails_falls_back_and_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.linalg.cholesky_ex

    def failing(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lower, failed = real(matrix)
        if matrix.shape[0] == 58:  # the inputs of down_proj
            failed.fill_(1)
        return lower, failed

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    output = tmp_path / "out"
    code, text = compress(source, *QUICK, "-o", output)
    assert code == 0, text
    layers = json.loads((output / "spallm_report.json").read_text())["layers"]
    assert {layer["name"] for layer in layers if layer["unweighted"]} == {
        f"model.layers.{index}.mlp.down_proj" for index in range(3)
    }
    assert "could not be factored" in text
    assert "could not be factored" in (output / "spallm_report.html").read_text()


def test_unusable_numbers_and_devices(source: Path, tmp_path: Path) -> None:
    assert "--seqlen" in refused(tmp_path / "out", source, "--seqlen", "2")
    assert "--device" in refused(tmp_path / "out", source, "--device", "abacus")
    assert "cannot be reached" in refused(tmp_path / "out", source, "--target-bits", "2.01", *QUICK)
