"""``spallm-eval`` as a user meets it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.data import file_windows
from spallm_serve.eval_cli import app
from spallm_serve.evaluation import perplexity
from spallm_serve.models import load_model, load_tokenizer
from tests.tiny_models import CONFIGS, save_tiny, save_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def compressed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compressed") / "out"
    settings = CompressSettings(bits=3, samples=2, seqlen=8, estimator_rank=0, refit=False)
    compress(str(original), output, settings, SilentObserver())
    return output


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    entry = {"instruction": "Is it?\n\nAnswer format: true/false", "input": ""}
    entries = [entry | {"answer": answer} for answer in ("true", "false", "false", "false")]
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    return tmp_path / "questions.json"


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    message = result.output[result.output.index("error:") :].strip()
    assert "\n" not in message
    assert "Traceback" not in result.output
    return message


def test_perplexity(compressed: Path, text: Path) -> None:
    found = json.loads(run("ppl", compressed, "--text", text, "--seqlen", "20", "--json"))
    windows = file_windows(text, load_tokenizer(compressed), 20)
    wanted = perplexity(load_model(compressed), windows)
    assert found["perplexity"]["value"] == pytest.approx(wanted.value, rel=1e-4)
    assert found["perplexity"]["standard_error"] == pytest.approx(wanted.standard_error, rel=1e-3)
    assert (found["windows"], found["seqlen"]) == (len(TEXT) // 20, 20)
    shown = run("ppl", compressed, "--text", text, "--seqlen", "20")
    assert f"{found['perplexity']['value']:.4f}" in shown


def test_comparison(original: Path, compressed: Path, text: Path) -> None:
    options = ("--text", text, "--seqlen", "16", "--windows", "5")
    found = json.loads(run("compare", original, compressed, *options, "--json"))
    values = {name: entry["value"] for name, entry in found.items() if isinstance(entry, dict)}
    assert values["KL divergence (nats/token)"] > 0
    assert 0 <= values["top-1 agreement"] <= 1
    alone = json.loads(run("ppl", original, *options, "--json"))["perplexity"]
    assert found["perplexity of the original"] == alone
    assert (found["windows"], found["tokens"]) == (5, 75)
    same = json.loads(run("compare", compressed, compressed, *options, "--json"))
    assert same["KL divergence (nats/token)"] == {"value": 0, "standard_error": 0}
    assert "agreement" in run("compare", original, compressed, *options)


def test_choices(compressed: Path, questions: Path, tmp_path: Path) -> None:
    found = json.loads(run("choice", compressed, "--data", questions, "--json"))
    # All questions are one, so either one or three of four answers are right.
    assert found["accuracy"]["value"] in (0.25, 0.75)
    assert found["accuracy"]["standard_error"] == pytest.approx(math.sqrt(3 / 4 / 3 / 4))
    assert found["questions"] == 4
    lines = [json.dumps(entry) for entry in json.loads(questions.read_text())]
    (tmp_path / "q.jsonl").write_text("\n\n".join(lines))
    assert json.loads(run("choice", compressed, "--data", tmp_path / "q.jsonl", "--json")) == found
    first = json.loads(run("choice", compressed, "--data", questions, "--limit", "1", "--json"))
    assert first["questions"] == 1
    assert "accuracy" in run("choice", compressed, "--data", questions)


def test_json_of_one_observation_is_json(compressed: Path, text: Path) -> None:
    """A single window has no standard error; NaN is no JSON."""
    options = ("--text", text, "--seqlen", "16", "--windows", "1", "--json")

    def reject(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(run("ppl", compressed, *options), parse_constant=reject)


def test_text_that_cannot_be_used(compressed: Path, text: Path, tmp_path: Path) -> None:
    assert "no such file" in refused("ppl", compressed, "--text", tmp_path / "absent.txt")
    assert "shorter than one window" in refused("ppl", compressed, "--text", text)
    assert "no such file" in refused("choice", compressed, "--data", tmp_path / "absent.json")


def test_models_that_cannot_be_used(
    original: Path, compressed: Path, text: Path, tmp_path: Path
) -> None:
    assert "no such directory" in refused("ppl", tmp_path / "absent", "--text", text)
    bare = save_tiny("gpt2", tmp_path / "bare")
    assert "no usable tokenizer" in refused("ppl", bare, "--text", text)
    damaged = Path(shutil.copytree(compressed, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert str(damaged) in refused("compare", original, damaged, "--text", text)


def test_models_with_different_vocabularies(original: Path, text: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_dict(CONFIGS["llama"].to_dict() | {"vocab_size": 140})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "larger")
    save_tokenizer(tmp_path / "larger")
    message = refused("compare", original, tmp_path / "larger", "--text", text, "--seqlen", "16")
    assert "131" in message
    assert "140" in message


def test_tokenizer_of_another_model(text: Path, tmp_path: Path) -> None:
    pairs = [(first, second) for first in "abcdefg" for second in "hijklmn"]
    mixed = save_tokenizer(save_tiny("llama", tmp_path / "mixed"), merges=(*pairs, ("j", "u")))
    message = refused("ppl", mixed, "--text", text, "--seqlen", "16")
    assert "do not belong together" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "at least one"),
        ('{"instruction": "x"}', "list"),
        ('[{"instruction": "Answer format: a/b", "answer": "a"}, {"answer": "a"}]', "question 2"),
        ('[{"instruction": "Answer format: a/b", "answer": "c"}]', "none of a/b"),
    ],
)
def test_questions_that_are_none(
    content: str, message: str, compressed: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text(content)
    assert message in refused("choice", compressed, "--data", tmp_path / "bad.json")
