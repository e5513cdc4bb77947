"""The benchmark of what integers cost in quality; its engines are stood in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spallm_serve.benchmarks import integers
from spallm_serve.benchmarks.cli import app
from spallm_serve.benchmarks.records import BenchmarkResults
from spallm_serve.kernels.cpu.integers import INTEGERS_VARIABLE

LOSSES = {
    ("float32", "0"): [1.0, 2.0, 3.0, 4.0],
    ("float32", "16"): [1.1, 2.0, 2.9, 4.4],
    ("bfloat16", "0"): [1.0, 2.0, 3.0, 4.4],
    ("bfloat16", "16"): [1.5, 2.5, 3.5, 4.5],
}
WHY_NOT = {torch.int8: "no such thing", torch.int16: None}


@pytest.mark.parametrize("native", [False, True])
def test_losses_are_compared_token_by_token(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(module: str, told: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        dtype = told.pop("dtype")
        assert told == {"model": "/a/base", "text": "/a/text", "windows": 2}
        return {"losses": LOSSES[dtype, environment[INTEGERS_VARIABLE]]}

    monkeypatch.setattr(integers, "measured_apart", engine)
    monkeypatch.setattr(integers, "why_no_integers", lambda dtype: WHY_NOT[dtype])
    monkeypatch.setattr(integers, "bfloat16_is_native", lambda device: native)
    found = tmp_path / "found.json"
    command = ["integers", "--base", "/a/base", "--text", "/a/text", "--windows", "2"]
    result = CliRunner().invoke(app, [*command, "--json", str(found)])
    assert result.exit_code == 0, result.output
    records = BenchmarkResults.model_validate_json(found.read_text()).records
    loss, more, spread = records[:3]
    assert loss.case == {"base": "base", "activations": "float32", "tables": "int16", "tokens": 4}
    assert (loss.ours, loss.peer) == (2.6, 2.5)
    # Of 0.1, 0, -0.1, 0.4: the mean, its standard error, and the root of the mean square.
    assert more.ours == pytest.approx(0.1)
    assert more.spread == pytest.approx((0.1 - 0.108012, 0.1 + 0.108012), abs=1e-5)
    assert spread.ours == pytest.approx((0.18 / 4) ** 0.5, abs=1e-6)
    others = [(each.case["activations"], each.case["tables"], each.ours) for each in records[3::3]]
    assert others == ([("bfloat16", "floats", 2.6), ("bfloat16", "int16", 3.0)] if native else [])


def test_without_instructions_for_them_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "why_no_integers", lambda dtype: f"no such {dtype}")
    result = CliRunner().invoke(app, ["integers", "--base", "a", "--text", "b"])
    assert result.exit_code == 2
    assert "no such torch.int8; no such torch.int16" in result.output
