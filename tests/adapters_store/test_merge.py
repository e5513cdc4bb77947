"""A merged model computes what the base does with the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spallm_serve.checkpoint as checkpoint
from spallm_serve.adapted import apply_adapter
from spallm_serve.adapter import Adapter, lora_modules
from spallm_serve.adapters_store import merge as merging
from spallm_serve.adapters_store.base import check_fits, open_base
from spallm_serve.adapters_store.merge import merge, tensor_count
from spallm_serve.checkpoint import verify_checkpoint
from spallm_serve.errors import UserError
from spallm_serve.models import load_model, weight_of
from spallm_serve.shards import INDEX_FILE
from spallm_serve.sketch import Sketch
from tests.adapters_store.made import lora, lut, smt

Bases = dict[str, dict[str, Path]]
IDS = torch.arange(3, 35).view(2, 16)


def merged(adapter: Adapter, base: Path, output: Path) -> Path:
    opened = open_base(str(base), output.parent / "scratch")
    check_fits(adapter, opened)
    seen: list[int] = []
    merge(adapter, opened, output, seen.append)
    assert seen[-1] >= tensor_count(adapter, opened)
    assert not output.with_name(output.name + ".partial").exists()
    return output


def logits(
    directory: Path, adapter: Adapter | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    model = load_model(directory, dtype)
    if adapter is not None:
        apply_adapter(model, adapter)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(found: Tensor, wanted: Tensor, share: float) -> bool:
    return float((found - wanted).norm()) < share * float(wanted.norm())


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_tables_stay_compressed_and_give_the_same_logits(
    architecture: str, bases: Bases, tmp_path: Path
) -> None:
    base = bases[architecture]["sketched"]
    adapter = lut(load_model(base))
    output = merged(adapter, base, tmp_path / "merged")
    wanted = logits(base, adapter)
    assert torch.equal(logits(output), wanted)
    half = torch.bfloat16
    assert torch.equal(logits(output, dtype=half), logits(base, adapter, half))
    assert not close(wanted, logits(base), 0.01)
    assert verify_checkpoint(output) == verify_checkpoint(base)
    there = {path.name for path in output.iterdir()}
    beside = {path.name for path in base.iterdir()} - {"spallm_report.json", "spallm_report.html"}
    assert there == beside
    assert (output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_other_adapters_of_the_base_still_load(sketched: Path, tmp_path: Path) -> None:
    first, second = (lut(load_model(sketched), seed) for seed in (1, 2))
    output = merged(first, sketched, tmp_path / "merged")
    model = load_model(output)
    apply_adapter(model, second)
    # The rows that the second leaves alone are now the first's: both change the same ones here.
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits(sketched, second))


@pytest.mark.parametrize("kind", [smt, lora])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_deltas_in_a_dense_base(kind, architecture: str, bases: Bases, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base = bases[architecture]["dense"]
    adapter = kind(load_model(base))
    output = merged(adapter, base, tmp_path / "merged")
    wanted = logits(base, adapter)
    assert close(logits(output), wanted, 1e-5)
    assert not close(logits(base), wanted, 0.01)
    config = (output / "config.json").read_text()
    assert json.loads(config) == json.loads((base / "config.json").read_text())


@pytest.mark.parametrize("kind", [smt, lora])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_deltas_in_a_compressed_base_make_it_dense(
    kind,
    architecture: str,
    bases: Bases,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    base = bases[architecture]["sketched"]
    adapter = kind(load_model(base))
    output = merged(adapter, base, tmp_path / "merged")
    wanted = logits(base, adapter)
    rounding, change = logits(output) - wanted, logits(base) - wanted
    # Rounding to bfloat16 grows on its way through these random layers, but not to the change's.
    assert float(rounding.norm()) < 0.2 * float(change.norm())
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in load_model(output, "auto").parameters()} == {  # type: ignore[arg-type]
        torch.bfloat16
    }
    assert not (output / "estimators.safetensors").exists()


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_a_compressed_weight_is_looked_up_added_to_and_rounded_once(
    architecture: str, bases: Bases, tmp_path: Path
) -> None:
    base = bases[architecture]["sketched"]
    model = load_model(base)
    adapter = lora(model)
    found = load_model(merged(adapter, base, tmp_path / "merged"))
    for name, (a, b) in lora_modules(adapter).items():
        layer = model.get_submodule(name)
        sketch = Sketch(layer.planes(), layer.tables, layer.columns)
        wanted = (sketch.weight() + 2 * (b @ a)).bfloat16().float()
        assert torch.equal(weight_of(found.get_submodule(name)), wanted), name
    embedding = model.get_input_embeddings()
    ids = torch.arange(131)
    with torch.no_grad():
        wanted = embedding(ids).bfloat16().float()
        assert torch.equal(found.get_input_embeddings()(ids), wanted)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_a_lora_on_a_tied_head_leaves_the_embedding_alone(
    architecture: str, bases: Bases, tmp_path: Path
) -> None:
    base = bases[architecture]["dense"]
    adapter = lora(load_model(base), ["lm_head"])
    output = merged(adapter, base, tmp_path / "merged")
    assert close(logits(output), logits(base, adapter), 1e-5)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = (load_model(path).get_input_embeddings().weight for path in (base, output))
    assert torch.equal(before, after)


def test_the_dtype_of_a_dense_base_is_kept(dense: Path, tmp_path: Path) -> None:
    model = load_model(dense, torch.bfloat16)
    base = tmp_path / "half"
    model.save_pretrained(base)
    adapter = lora(model)
    output = merged(adapter, base, tmp_path / "merged")
    found = load_model(output, "auto").state_dict()  # type: ignore[arg-type]
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter.tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    wanted = model.get_submodule(name).weight.float() + 2 * b @ a
    assert torch.equal(found[f"{name}.weight"], wanted.bfloat16())


def test_many_shards(sketched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10_000)
    adapter = lut(load_model(sketched))
    output = merged(adapter, sketched, tmp_path / "merged")
    assert (output / INDEX_FILE).is_file()
    assert torch.equal(logits(output), logits(sketched, adapter))


def test_what_is_there_is_not_overwritten(sketched: Path, tmp_path: Path) -> None:
    adapter = lut(load_model(sketched))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in sketched.iterdir())
    with pytest.raises(UserError, match="already holds a model"):
        merged(adapter, sketched, sketched)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in sketched.iterdir()) == before


def test_a_failure_leaves_nothing_behind(
    sketched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, directory: Path) -> int:
        (directory / "shard-1.tmp").write_bytes(b"part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "write_shards", full)
    adapter = lut(load_model(sketched))
    with pytest.raises(UserError, match="No space left"):
        merged(adapter, sketched, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []
