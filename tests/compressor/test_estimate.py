"""What a run is said to take, against what the finished run took."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from spallm_serve.compressor.estimate import estimate_run, output_sizes
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.plan import make_plan
from spallm_serve.compressor.record import CompressionRecord
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.models import open_source, skeleton
from tests.tiny_models import save_tiny

QUICK = {"bits": 3, "samples": 2, "seqlen": 8, "estimator_rank": 0, "refit": False}


@pytest.fixture(autouse=True)
def no_probe_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = "spallm_serve.compressor.estimate._matrix_speed"
    monkeypatch.setattr(speed, lambda device: 1e9)
    monkeypatch.setattr("spallm_serve.compressor.publish.write_report", lambda record, path: None)


def stored(directory: Path) -> int:
    """Bytes of all tensors in the safetensors files of a directory."""
    return sum(
        tensor.nbytes
        for path in directory.glob("*.safetensors")
        for tensor in load_file(path).values()
    )


def finish(source: Path, output: Path, settings: CompressSettings) -> CompressionRecord:
    return compress(str(source), output, settings, SilentObserver())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {}),
        ("llama-tied", {"embeddings": 4}),
        ("llama", {"embeddings": 2, "groups_per_row": 2, "estimator_rank": 2}),
        ("gpt2", {"bits_for": (("*.c_fc", 4),), "skip": ("*.0.attn.*",)}),
        ("phi", {"embeddings": 3}),
        ("opt", {}),
    ],
)
def test_sizes_are_those_of_the_finished_run(
    name: str, more: dict[str, object], tmp_path: Path
) -> None:
    directory = save_tiny(name, tmp_path / "source")
    settings = CompressSettings.model_validate(QUICK | more)
    source = open_source(str(directory), tmp_path / "scratch")
    model = skeleton(source.config)
    sizes = output_sizes(source, model, make_plan(model, settings), settings)
    estimate = estimate_run(source, settings)
    record = finish(directory, tmp_path / "out", settings)
    assert sizes.sketches == record.sizes["codes"] + record.sizes["tables"]
    assert sizes.untouched == record.sizes["other"]
    assert sizes.estimators >= record.sizes["estimators"]
    assert sum(record.sizes.values()) == stored(tmp_path / "out")
    real = stored(tmp_path / "out") - record.sizes["estimators"]
    assert estimate.output_bytes - sizes.estimators == pytest.approx(real, rel=0.01)
    assert estimate.disk_bytes >= estimate.output_bytes
    assert estimate.layers == len(record.layers)
    assert estimate.bits_per_weight == pytest.approx(record.bits_per_weight, rel=1e-9)
    assert record.original_bytes == stored(directory)
    assert estimate.peak_bytes > record.original_bytes
    assert estimate.minutes > 0


@pytest.mark.parametrize("target", [4.3, 4.8])
@pytest.mark.parametrize("more", [{}, {"bits_for": (("*.0.*", 2),)}])
def test_target_is_kept(target: float, more: dict[str, object], tmp_path: Path) -> None:
    directory = save_tiny("llama", tmp_path / "source")
    settings = CompressSettings.model_validate(QUICK | {"target_bits": target} | more)
    estimate = estimate_run(open_source(str(directory), tmp_path / "scratch"), settings)
    record = finish(directory, tmp_path / "out", settings)
    used = sum(layer.nbytes for layer in record.layers)
    assert 8 * used / record.weight_counts["compressed"] == pytest.approx(record.bits_per_weight)
    assert record.bits_per_weight <= target
    # No layer that may still grow would fit.
    assert record.bits_per_weight > target - 0.25
    assert len({layer.bits for layer in record.layers}) > 1
    assert estimate.bits_per_weight == pytest.approx(target, rel=1e-3)
    assert estimate.output_bytes >= stored(tmp_path / "out")
    if more:
        assert {layer.bits for layer in record.layers if ".0." in layer.name} == {2}


def test_estimate_covers_embeddings_beside_a_target(tmp_path: Path) -> None:
    """The target may be for the linears alone, but then the estimate must say what it comes to."""
    directory = save_tiny("llama", tmp_path / "source")
    settings = CompressSettings.model_validate(QUICK | {"target_bits": 4.5, "embeddings": 4})
    estimate = estimate_run(open_source(str(directory), tmp_path / "scratch"), settings)
    finish(directory, tmp_path / "out", settings)
    real = stored(tmp_path / "out")
    assert real <= estimate.output_bytes <= 1.05 * real


def test_skipped_layers_and_named_bits_are_reflected(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path / "source")), tmp_path / "scratch")

    def estimated(**more: object) -> tuple[int, int]:
        found = estimate_run(source, CompressSettings.model_validate(QUICK | more))
        return found.layers, found.output_bytes

    layers, size = estimated()
    assert layers == 3 * 7
    # down_proj is 36 by 58: eight bytes a row in each plane, and 2**bits entries of two bytes.
    extra = 36 * 8 + 36 * 2 * (16 - 8)
    assert estimated(bits_for=(("*.1.mlp.down_proj", 4),)) == (layers, size + extra)
    assert estimated(bits_for=(("*.down_proj", 4),)) == (layers, size + 3 * extra)
    back = 36 * 58 * 4 - (3 * 36 * 8 + 36 * 2 * 8)
    assert estimated(skip=("*.2.mlp.down_proj",)) == (layers - 1, size + back)
