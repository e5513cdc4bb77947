"""A base's identity from its files; adapters that do not fit are refused without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spallm_serve.adapter import Adapter, LutConfig
from spallm_serve.adapter_files import read_adapter, write_adapter
from spallm_serve.adapters_store.base import check_fits, open_base
from spallm_serve.errors import UserError
from spallm_serve.identity import base_identity
from spallm_serve.models import load_model
from spallm_serve.shards import SINGLE_FILE
from tests.adapters_store.made import MAKERS, lora, lut, smt
from tests.spallm_serve.test_checkpoint import flip_byte

Bases = dict[str, dict[str, Path]]


@pytest.mark.parametrize("kind", ["dense", "sketched"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_the_identity_of_the_files_is_that_of_the_model(
    architecture: str, kind: str, bases: Bases, tmp_path: Path
) -> None:
    directory = bases[architecture][kind]
    digest = base_identity(load_model(directory))
    assert open_base(str(directory), tmp_path).digest() == digest
    assert base_identity(load_model(directory, torch.bfloat16)) == digest


@pytest.mark.parametrize("kind", ["lut", "smt", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_what_fits(architecture: str, kind: str, bases: Bases, tmp_path: Path) -> None:
    for form in ("sketched",) if kind == "lut" else ("sketched", "dense"):
        directory = bases[architecture][form]
        adapter = MAKERS[kind](load_model(directory))
        write_adapter(adapter, tmp_path / form)
        read = read_adapter(tmp_path / form)
        found = check_fits(read, open_base(str(directory), tmp_path))
        assert found == base_identity(load_model(directory))


def changed(adapter: Adapter, **tensors: Tensor) -> Adapter:
    """With some tensors replaced, by the end of their name with underscores for dots."""
    found = dict(adapter.tensors)
    for ending, tensor in tensors.items():
        name = next(name for name in found if name.endswith(ending.replace("__", ".")))
        found[name] = tensor
    return Adapter(adapter.config, found)


def refused(adapter: Adapter, base: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_fits(adapter, open_base(str(base), tmp_path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit(bases: Bases, sketched: Path, tmp_path: Path) -> None:
    model = load_model(sketched)
    tables, blocks, products = lut(model), smt(model), lora(model)
    wide = torch.zeros(36, 2, 16, dtype=torch.float16)
    message = refused(changed(tables, o_proj__tables=wide), sketched, tmp_path)
    assert "o_proj.tables: expected [36, 2, 8]" in message
    beyond = torch.tensor([[0, 0], [40, 0]], dtype=torch.int32)
    message = refused(changed(blocks, q_proj__block_index=beyond), sketched, tmp_path)
    assert "outside" in message
    narrow = torch.zeros(3, 35)
    message = refused(changed(products, q_proj__lora_A__weight=narrow), sketched, tmp_path)
    assert "q_proj: expected lora_A [3, 36]" in message
    assert "no such" in refused(products, bases["gpt2"]["dense"], tmp_path)
    assert "no such compressed" in refused(tables, bases["llama"]["dense"], tmp_path)


def test_another_base(bases: Bases, sketched: Path, dense: Path, tmp_path: Path) -> None:
    adapter = smt(load_model(sketched))
    message = refused(adapter, dense, tmp_path)
    digests = {base_identity(load_model(path)) for path in (sketched, dense)}
    assert all(digest in message for digest in digests)


def test_damaged_bases(sketched: Path, tmp_path: Path) -> None:
    adapter = lut(load_model(sketched))
    copy = Path(shutil.copytree(sketched, tmp_path / "codes"))
    flip_byte(copy / SINGLE_FILE, "model.layers.1.mlp.up_proj.codes", 3)
    assert "damaged" in refused(adapter, copy, tmp_path)
    copy = Path(shutil.copytree(sketched, tmp_path / "config"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["groups_per_row"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    assert "has shape" in refused(adapter, copy, tmp_path)


def test_only_our_own_compression(dense: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dense, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="spallm-compress"):
        open_base(str(copy), tmp_path)


Half = torch.float16


@pytest.mark.parametrize(
    ("kind", "tensors", "said"),
    [
        ("lut", {"o_proj__tables": torch.zeros(36, 2, 8)}, "expected float16"),
        ("lut", {"o_proj__tables": torch.zeros(36, 2, 7, dtype=Half)}, "7 entries"),
        ("lut", {"__rows": torch.tensor([1, 0, 2, 3], dtype=torch.int32)}, "ascending"),
        ("lut", {"__rows": torch.tensor([1, 2], dtype=torch.int32)}, "2 rows"),
        ("lut", {"norm__weight": torch.full((36,), torch.nan)}, "NaN"),
        ("lut", {"norm__weight": torch.zeros(36, 2)}, "1 dimensions"),
        ("smt", {"q_proj__blocks": torch.zeros(2, 8, 4, dtype=Half)}, "block size 8"),
        ("smt", {"q_proj__block_index": torch.zeros(2, 2, dtype=torch.int32)}, "twice"),
        ("smt", {"q_proj__block_index": torch.zeros(2, 2)}, "expected int32"),
        ("lora", {"q_proj__lora_A__weight": torch.zeros(2, 36)}, "rank 3"),
        ("lora", {"q_proj__lora_A__weight": torch.zeros(0, 36)}, "2 dimensions"),
    ],
)
def test_what_is_no_adapter_by_itself(
    kind: str, tensors: dict[str, Tensor], said: str, sketched: Path, tmp_path: Path
) -> None:
    adapter = changed(MAKERS[kind](load_model(sketched)), **tensors)
    write_adapter(adapter, tmp_path / "adapter")
    with pytest.raises(UserError, match=said) as caught:
        read_adapter(tmp_path / "adapter")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("lut", "a.rows", "no tables"),
        ("lut", "a.codes", "neither"),
        ("smt", "a.blocks", "needs both"),
        ("smt", "a.tables", "neither"),
        ("lora", "base_model.model.a.lora_A.weight", "needs both"),
        ("lora", "base_model.model.a.lora_magnitude_vector", "neither"),
    ],
)
def test_what_does_not_belong(
    kind: str, name: str, said: str, sketched: Path, tmp_path: Path
) -> None:
    adapter = MAKERS[kind](load_model(sketched))
    tensors = {**adapter.tensors, name: torch.ones(1)}
    write_adapter(Adapter(adapter.config, tensors), tmp_path / "adapter")
    with pytest.raises(UserError, match=said):
        read_adapter(tmp_path / "adapter")


def test_too_large_to_be_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LutConfig(base_digest="0" * 64)
    tables = torch.zeros(36, 1, 4, dtype=Half)
    write_adapter(Adapter(config, {"a.tables": tables}), tmp_path / "adapter")
    monkeypatch.setattr("spallm_serve.adapter_files.MAX_TENSOR_BYTES", 100)
    with pytest.raises(UserError, match="larger than"):
        read_adapter(tmp_path / "adapter")
