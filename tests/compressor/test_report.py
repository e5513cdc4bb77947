"""The report of a compression run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from spallm_serve.compressor.record import CompressionRecord, LayerRecord, TableSample
from spallm_serve.compressor.report import write_report
from spallm_serve.compressor.settings import CompressSettings


def layer(name: str, **changes: Any) -> LayerRecord:
    """An ordinary layer."""
    usual = LayerRecord(
        name=name,
        rows=64,
        columns=64,
        bits=4,
        groups_per_row=1,
        nbytes=4096,
        relative_error=0.01,
        damping=0.1,
        damping_raises=0,
        unweighted=False,
        estimator_energy=0.25,
    )
    return usual.model_copy(update=changes)


def record(**changes: Any) -> CompressionRecord:
    """A run over two blocks with two linears each."""
    names = [f"model.layers.{block}.mlp.{kind}" for block in range(2) for kind in ("up", "down")]
    usual = CompressionRecord(
        model="some/model",
        settings=CompressSettings.model_validate(
            {"bits_for": [["*.down", 3]], "skip": ["lm_head"]}
        ),
        calibration_tokens=4096,
        layers=[layer(name) for name in names],
        skipped=["lm_head"],
        sizes={"codes": 8192, "tables": 8192, "other": 1000, "estimators": 500},
        weight_counts={"compressed": 16384, "other": 500},
        original_bytes=33768,
        base_digest="0123456789abcdef" * 4,
        refine_losses=[0.5, 0.4, 0.3],
        samples=[
            TableSample(layer=names[0], row=3, table=[-0.5, 0.0, 0.1, 0.5], weights=[-0.4, 0.2])
        ],
    )
    return usual.model_copy(update=changes)


def written(run: CompressionRecord, directory: Path) -> str:
    """The page, less the break opportunities in names."""
    path = directory / "report.html"
    write_report(run, path)
    return path.read_text(encoding="utf-8").replace("<wbr>", "")


def test_same_record_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_report(record(), tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_shows_what_the_record_holds(tmp_path: Path) -> None:
    html = written(record(), tmp_path)
    for run_layer in record().layers:
        assert f"<code>{run_layer.name}</code>" in html
    assert "<code>lm_head</code>" in html
    assert '<dd class="value">8.000</dd>' in html, "bits per weight, tables counted"
    assert "of 33.8 kB: 1.89 times smaller" in html
    assert "<dd>*.down=3</dd>" in html
    assert "0123456789abcdef" * 4 in html


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    name = "model.0.<script>alert(1)</script>"
    sample = TableSample(layer=name, row=0, table=[0.0, 1.0], weights=[0.1, 0.9])
    hostile = record(model=name, layers=[layer(name)], skipped=[name], samples=[sample])
    html = written(hostile, tmp_path)
    assert html.count("<script>") == 1, "only the page's own"
    assert "&lt;script&gt;alert(1)" in html


def test_refers_to_nothing_outside(tmp_path: Path) -> None:
    html = written(record(), tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|<link|\bsrc=|url\((?!#)", html)


def test_a_run_without_distillation_samples_and_estimators(tmp_path: Path) -> None:
    layers = [layer("lm_head", estimator_energy=None, relative_error=0.0)]
    sizes = {"codes": 8192, "tables": 8192, "other": 0, "estimators": 0}
    bare = record(layers=layers, refine_losses=[], samples=[], skipped=[], sizes=sizes)
    html = written(bare, tmp_path)
    for absent in ("Distillation", "Est. energy", "stand for", "left as they were (", "serve the"):
        assert absent not in html
    assert "Every Hessian could be factored" in html


@pytest.mark.parametrize("errors", [(0.011, 0.012), (0.001, 0.002), (1e-9, 0.5), (0.01, 0.01)])
def test_every_range_of_errors_can_be_drawn(tmp_path: Path, errors: tuple[float, float]) -> None:
    layers = [layer(f"h.{block}.up", relative_error=error) for block, error in enumerate(errors)]
    html = written(record(layers=layers), tmp_path)
    assert len(re.findall(r"<text[^>]*>[^<]* %</text>", html)) >= 4, "two ticks in two drawings"


def test_says_what_happened_to_unweighted_and_damped_layers(tmp_path: Path) -> None:
    names = record().layers
    layers = [
        names[0].model_copy(update={"unweighted": True, "damping_raises": 6}),
        names[1].model_copy(update={"damping": 1.0, "damping_raises": 1}),
        *names[2:],
    ]
    html = written(record(layers=layers), tmp_path)
    assert "The Hessian of 1 layer could not be factored; it was rounded without it" in html
    assert "The Hessian of 1 layer could not be factored with a damping of 0.1" in html
    assert html.count('<tr class="warning">') == html.count('<tr class="notice">') == 1
    both = [one.model_copy(update={"unweighted": True}) for one in names[:2]]
    html = written(record(layers=both), tmp_path)
    assert "The Hessian of 2 layers could not be factored; they were rounded without it" in html


def test_kinds_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    alike = [layer("h.0.attn.c_proj"), layer("h.0.mlp.c_proj"), layer("h.0.mlp.experts.3.c_fc")]
    html = written(record(layers=alike), tmp_path)
    for kind in ("attn.c_proj", "mlp.c_proj", "mlp.experts.c_fc"):
        assert f"</i>{kind}</li>" in html
