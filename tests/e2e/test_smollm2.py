"""The real SmolLM2-135M-Instruct out of its package: compress, load, compare, talk."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spallm_serve.benchmarks.model import packaged_gguf
from spallm_serve.compressor.cli import app
from spallm_serve.compressor.publish import finished_record
from spallm_serve.data import file_windows
from spallm_serve.evaluation import compare
from spallm_serve.models import load_model, load_tokenizer, resolve_model

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two halves of Python's language reference: to calibrate on and to judge on."""
    folder = tmp_path_factory.mktemp("text")
    topics = list(pydoc_data.topics.topics.values())
    halves = topics[::2], topics[1::2]
    paths = folder / "calibration.txt", folder / "held-out.txt"
    for path, half in zip(paths, halves, strict=True):
        path.write_text("\n".join(half), encoding="utf-8")
    return paths


def test_four_bits_stay_close_to_the_original(texts: tuple[Path, Path], tmp_path: Path) -> None:
    calibration, held_out = texts
    output = tmp_path / "four-bit"
    unpacked = resolve_model(str(packaged_gguf()), tmp_path / "original")
    arguments = [
        str(unpacked), "--bits", "4", "--calibration", str(calibration),
        "--samples", "2", "--seqlen", "256", "-o", str(output),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = finished_record(output)
    assert record is not None
    assert len(record.layers) == 30 * 7
    assert record.bits_per_weight == pytest.approx(4.375, abs=0.01)
    assert not (output / ".unfinished").exists()

    original = load_model(unpacked)
    compressed, tokenizer = load_model(output), load_tokenizer(output)
    windows = file_windows(held_out, tokenizer, 256, 4)
    found = compare(original, compressed, windows)
    assert found.divergence.value < 0.25
    assert found.compressed.value < 1.25 * found.original.value

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = compressed.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
