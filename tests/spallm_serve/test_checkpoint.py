"""Compressed checkpoints on disk: damage and strangers are named, shards hold everything once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import spallm_serve.checkpoint as checkpoint
from spallm_serve.checkpoint import (
    CODES,
    parse_sketch_config,
    read_sketch_config,
    sketch_names,
    sketch_tensors,
    verify_checkpoint,
    write_shards,
)
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.errors import UserError
from spallm_serve.models import load_model
from spallm_serve.shards import INDEX_FILE, SINGLE_FILE, ShardReader
from spallm_serve.sketch import Sketch
from tests.tiny_models import save_tiny

DIGEST = "0123456789abcdef" * 4
VALID = {
    "quant_method": "spallm",
    "format": 1,
    "bits": 3,
    "groups_per_row": 2,
    "base_digest": DIGEST,
    "overrides": {"a.b": {"bits": 4, "groups_per_row": 1}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    source = save_tiny("llama-tied", directory / "source")
    settings = CompressSettings(bits=3, samples=2, seqlen=8, estimator_rank=2, embeddings=4)
    compress(str(source), directory / "out", settings, SilentObserver())
    return directory / "out"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def flip_byte(file: Path, tensor: str, position: int) -> None:
    """Flip all bits of one byte of a tensor, where it lies in the file."""
    raw = bytearray(file.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    start, stop = json.loads(raw[8 : 8 + header])[tensor]["data_offsets"]
    raw[8 + header + range(start, stop)[position]] ^= 0xFF
    file.write_bytes(raw)


def edit_config(directory: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    change(raw["quantization_config"])
    path.write_text(json.dumps(raw))


def test_intact_checkpoint_is_verified(finished: Path) -> None:
    config = verify_checkpoint(finished)
    assert config == read_sketch_config(finished)
    assert config.embeddings == ["model.embed_tokens"]
    names = sketch_names(ShardReader(finished))
    assert names == sorted(names)
    assert len(names) == 3 * 7 + 1
    assert {config.layer(name).bits for name in names} == {3, 4}


@pytest.mark.parametrize("layer", ["model.layers.1.mlp.up_proj", "model.embed_tokens"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_damaged_byte_of_the_codes(copy: Path, layer: str, position: int) -> None:
    flip_byte(copy / SINGLE_FILE, layer + CODES, position)
    wanted = read_sketch_config(copy).base_digest
    for read in (verify_checkpoint, AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(UserError, match="damaged") as caught:
            read(copy)
        message = str(caught.value)
        digests = {word.strip(",;") for word in message.split() if len(word.strip(",;")) == 64}
        assert wanted in digests
        assert len(digests) == 2
        assert str(copy) in message
        assert "\n" not in message


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_other_formats_are_refused(copy: Path, version: object) -> None:
    edit_config(copy, lambda raw: raw.update(format=version))
    for read in (verify_checkpoint, AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(UserError, match="format") as caught:
            read(copy)
        assert repr(version) in str(caught.value)


def test_unknown_and_damaged_fields_are_named(copy: Path) -> None:
    edit_config(copy, lambda raw: raw.update(colour="red"))
    for read in (verify_checkpoint, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match="colour"):
            read(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 5),
        ("groups_per_row", 0),
        ("base_digest", "XYZ"),
        ("overrides", {"a": {"bits": 3}}),
        ("overrides", {"a": {"bits": 3, "groups_per_row": 1, "more": 1}}),
        ("skipped", "lm_head"),
    ],
)
def test_fields_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"here: quantization_config: {field}"):
        parse_sketch_config(VALID | {field: value}, "here")


def test_valid_configuration() -> None:
    config = parse_sketch_config(VALID, "here")
    assert config.layer("a.b").bits == 4
    assert config.layer("other").model_dump() == {"bits": 3, "groups_per_row": 2}
    assert parse_sketch_config(config.model_dump(), "here") == config


@pytest.mark.parametrize("raw", [None, [], "spallm", {}, VALID | {"quant_method": "gptq"}])
def test_not_ours(raw: object) -> None:
    with pytest.raises(UserError, match="not a model compressed by spallm-compress"):
        parse_sketch_config(raw, "here")


def test_uncompressed_or_unreadable_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        read_sketch_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        read_sketch_config(tmp_path)
    for text in ("{}", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="not a model compressed"):
            read_sketch_config(tmp_path)


@pytest.mark.parametrize("cut", [1, 5000])
def test_truncated_file(copy: Path, cut: int) -> None:
    file = copy / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(copy)
    with pytest.raises(UserError, match=f"{SINGLE_FILE}: damaged or truncated"):
        verify_checkpoint(copy)


def test_missing_weights(copy: Path) -> None:
    (copy / SINGLE_FILE).unlink()
    with pytest.raises(UserError, match=str(copy)):
        load_model(copy)
    with pytest.raises(UserError, match=SINGLE_FILE):
        verify_checkpoint(copy)


def test_lost_layer_is_noticed(copy: Path) -> None:
    with safe_open(copy / SINGLE_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    del tensors["model.layers.2.mlp.down_proj" + CODES]
    save_file(tensors, copy / SINGLE_FILE, metadata={"format": "pt"})
    for read in (verify_checkpoint, load_model):
        with pytest.raises(UserError, match="damaged"):
            read(copy)


def test_sketch_on_disk_and_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (5, 13), generator=generator).to(torch.uint8)
    sketch = Sketch.from_codes(codes, torch.randn(5, 1, 8, generator=generator))
    write_shards(sketch_tensors("a.b", sketch).items(), tmp_path)
    reader = ShardReader(tmp_path)
    assert sketch_names(reader) == ["a.b"]
    again = Sketch(reader.read("a.b.codes"), reader.read("a.b.tables"), 13)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.tables, sketch.tables)


@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=12), limit=st.integers(1, 100))
def test_shards_hold_everything_once(
    sizes: list[int], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.arange(size).to(torch.uint8) + i for i, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", limit)
        assert write_shards(iter(tensors.items()), directory) == sum(sizes)
    files = {path.name for path in directory.iterdir()}
    held: list[str] = []
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            stored = sum(file.get_tensor(name).nbytes for name in names)
        assert stored <= limit or len([name for name in names if len(tensors[name])]) == 1
        held += names
    assert sorted(held) == sorted(tensors)
    if files != {SINGLE_FILE}:
        index = json.loads((directory / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
        assert index["weight_map"].keys() == tensors.keys()
        assert files == {INDEX_FILE, *index["weight_map"].values()}
    reader = ShardReader(directory)
    assert set(reader) == tensors.keys()
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_sharded_checkpoint_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 4000)
    source = save_tiny("llama", tmp_path / "source")
    settings = CompressSettings(bits=2, samples=2, seqlen=8, estimator_rank=0, refit=False)
    compress(str(source), tmp_path / "out", settings, SilentObserver())
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    verify_checkpoint(tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert bool(torch.isfinite(model(torch.tensor([[3, 4]])).logits).all())


def test_reader_copies(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    save_file({"a": tensor}, tmp_path / SINGLE_FILE)
    before = (tmp_path / SINGLE_FILE).read_bytes()
    reader = ShardReader(tmp_path)
    first = reader.read("a")
    first.zero_()
    assert torch.equal(reader.read("a"), tensor)
    assert (tmp_path / SINGLE_FILE).read_bytes() == before
    held = reader.read("a")
    save_file({"a": -tensor}, tmp_path / SINGLE_FILE)
    assert torch.equal(held, tensor)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.uint8,
        torch.bool,
    ],
)
def test_reader_counts_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.ones(3, 5).to(dtype)
    save_file({"a": tensor, "none": tensor[:0]}, tmp_path / SINGLE_FILE)
    reader = ShardReader(tmp_path)
    assert reader.nbytes("a") == tensor.nbytes
    assert reader.nbytes("none") == 0
    assert reader.shape("a") == (3, 5)


def test_dominant_dtype_is_by_bytes(tmp_path: Path) -> None:
    tensors = {f"norm{i}": torch.ones(2) for i in range(9)}
    tensors["weight"] = torch.ones(50, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / SINGLE_FILE)
    assert ShardReader(tmp_path).dominant_dtype() == "BF16"
    tensors["weight"] = tensors["weight"][:30]
    save_file(tensors, tmp_path / SINGLE_FILE)
    assert ShardReader(tmp_path).dominant_dtype() == "F32"
