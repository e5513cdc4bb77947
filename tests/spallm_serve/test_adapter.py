"""The adapter format: round trips, identity, and everything that has to be refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from spallm_serve import adapter_files
from spallm_serve.adapter import (
    Adapter,
    LoraConfig,
    LutConfig,
    SmtConfig,
    adapter_digest,
    expect_kind,
    lora_modules,
    parse_adapter_config,
)
from spallm_serve.adapter_files import CONFIG_FILE, TENSOR_FILE, read_adapter, write_adapter
from spallm_serve.adapter_structure import check_structure
from spallm_serve.errors import UserError

DIGEST, OTHER = "ab" * 32, "cd" * 32
LUT = {"peft_type": "SPALLM_LUT", "format": 1, "base_digest": DIGEST}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def lut_adapter(**tensors: Tensor) -> Adapter:
    values = {"a.tables": torch.arange(8).view(2, 1, 4).half(), **tensors}
    return Adapter(LutConfig(base_digest=DIGEST, base_model_name_or_path="base"), values)


def smt_adapter() -> Adapter:
    tensors = {
        "a.blocks": torch.randn(2, 8, 8).half(),
        "a.block_index": torch.tensor([[0, 0], [0, 1]]).int(),
    }
    return Adapter(SmtConfig(base_digest=DIGEST, block_size=8), tensors)


def lora_adapter() -> Adapter:
    config = parse_adapter_config(LORA | {"base_digest": DIGEST, "task_type": "CAUSAL_LM"}, "here")
    prefix = "base_model.model.layers.0.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(4, 12),
        f"{prefix}.lora_B.weight": torch.randn(6, 4),
    }
    return Adapter(config, tensors)


@pytest.mark.parametrize("make", [lut_adapter, smt_adapter, lora_adapter])
def test_written_and_read_back(make: Any, tmp_path: Path) -> None:
    adapter = make()
    write_adapter(adapter, tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter", DIGEST)
    assert found.config.model_dump() == adapter.config.model_dump()
    assert found.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype
    assert adapter_digest(found) == adapter_digest(adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    adapter = smt_adapter()
    turned = Adapter(adapter.config, dict(reversed(adapter.tensors.items())))
    write_adapter(adapter, tmp_path / "one")
    write_adapter(turned, tmp_path / "two")
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_identity_is_what_counts() -> None:
    adapter = lut_adapter()
    renamed = Adapter(LutConfig(base_digest=DIGEST, base_model_name_or_path="x"), adapter.tensors)
    assert adapter_digest(renamed) == adapter_digest(adapter)
    tables = adapter.tensors["a.tables"]
    others = [
        Adapter(LutConfig(base_digest=OTHER), adapter.tensors),
        Adapter(adapter.config, {"b.tables": tables}),
        Adapter(adapter.config, {"a.tables": tables.float()}),
        Adapter(adapter.config, {"a.tables": tables.view(1, 2, 4)}),
        Adapter(adapter.config, {"a.tables": tables + 1}),
        lut_adapter(more=torch.zeros(1)),
    ]
    digests = {adapter_digest(other) for other in others}
    assert len(digests) == len(others)
    assert adapter_digest(adapter) not in digests


def test_another_base_is_refused_with_both_digests(tmp_path: Path) -> None:
    write_adapter(lut_adapter(), tmp_path / "adapter")
    with pytest.raises(UserError, match=f"{DIGEST}.*{OTHER}"):
        read_adapter(tmp_path / "adapter", OTHER)


def test_an_adapter_is_replaced_as_a_whole(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    write_adapter(lut_adapter(), directory)
    (directory / "training.json").write_text("{}")
    # What a kill left of an earlier attempt.
    (tmp_path / "adapter.partial").mkdir()
    (tmp_path / "adapter.partial" / "rubbish").touch()
    write_adapter(smt_adapter(), directory)
    assert isinstance(read_adapter(directory).config, SmtConfig)
    assert (directory / "training.json").exists()
    assert not (tmp_path / "adapter.partial").exists()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([], "peft_type None"),
        ({"peft_type": "IA3"}, "'IA3'"),
        (LUT | {"format": 2}, "format 2"),
        ({"peft_type": "SPALLM_LUT", "base_digest": DIGEST}, "format None"),
        (LUT | {"base_digest": "0" * 63}, "base_digest"),
        (LUT | {"base_digest": "../" + "0" * 61}, "base_digest"),
        (LUT | {"hooks": "x.py"}, "hooks"),
        (LUT | {"peft_type": "SPALLM_SMT", "block_size": 0}, "block_size"),
        (LUT | {"peft_type": "SPALLM_SMT", "block_size": 1 << 40}, "block_size"),
        (LORA | {"r": 0}, "r:"),
        (LORA | {"lora_alpha": float("nan")}, "lora_alpha"),
        (LORA | {"use_dora": True}, "use_dora"),
        (LORA | {"rank_pattern": {"q": 8}}, "rank_pattern"),
        (LORA | {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (LORA | {"bias": "all"}, "bias"),
    ],
)
def test_configurations_that_are_refused(raw: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_adapter_config(raw, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.sampled_from([LUT, LORA, LUT | {"peft_type": "SPALLM_SMT", "block_size": 4}]), st.data())
def test_anything_in_a_configuration_is_understood_or_refused(
    valid: dict[str, Any], data: st.DataObject
) -> None:
    field = data.draw(st.sampled_from([*valid, "more"]) | st.text())
    try:
        parse_adapter_config(valid | {field: data.draw(JSON)}, "here")
    except UserError as error:
        assert str(error).startswith("here: ")


def test_lora_scale_and_modules() -> None:
    adapter = lora_adapter()
    config = expect_kind(adapter, LoraConfig, "here")
    assert config.scale == 2
    assert LoraConfig(r=4, lora_alpha=8, use_rslora=True).scale == 4
    (name, (a, b)) = next(iter(lora_modules(adapter).items()))
    assert (name, a.shape, b.shape) == ("layers.0.q_proj", (4, 12), (6, 4))
    half = Adapter(config, {name: t for name, t in adapter.tensors.items() if "lora_A" in name})
    with pytest.raises(UserError, match="needs both"):
        check_structure(half)
    with pytest.raises(UserError, match="here: is a LORA adapter"):
        expect_kind(adapter, LutConfig, "here")


def damaged(directory: Path, kind: str) -> None:
    path = directory / TENSOR_FILE
    match kind:
        case "no configuration":
            (directory / CONFIG_FILE).unlink()
        case "configuration is no JSON":
            (directory / CONFIG_FILE).write_bytes(b"\x80{")
        case "configuration nested deep":
            (directory / CONFIG_FILE).write_text("[" * 100_000)
        case "huge configuration":
            (directory / CONFIG_FILE).write_text(json.dumps(LUT) + " " * (1 << 20))
        case "no tensors":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "no safetensors":
            path.write_bytes(b"\x80\x04pickle" * 10)
        case "empty":
            save_file({}, path)
        case "not finite":
            save_file({"a.tables": torch.tensor([[[0.0, 1, torch.inf, 2]]]).half()}, path)
        case _:
            header = {"a.tables": {"dtype": kind, "shape": [1, 1, 4], "data_offsets": [0, 4]}}
            written = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(written)) + written + bytes(4))


@pytest.fixture(params=["at once", "one after another"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How tensors are read: as those of small and as those of large files."""
    if request.param == "one after another":
        monkeypatch.setattr(adapter_files, "_READ_AT_ONCE", 0)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(
    "kind",
    ["no configuration", "configuration is no JSON", "configuration nested deep",
     "huge configuration", "no tensors", "truncated", "no safetensors", "empty", "not finite",
     "F8_E4M3", "F8_E8M0", "F6_E2M3", "I7"],
)  # fmt: skip
def test_damaged_directories(kind: str, tmp_path: Path) -> None:
    write_adapter(lut_adapter(), tmp_path / "adapter")
    damaged(tmp_path / "adapter", kind)
    with pytest.raises(UserError, match=str(tmp_path)):
        read_adapter(tmp_path / "adapter")


@pytest.mark.usefixtures("reading")
def test_tensors_are_in_the_order_of_their_names_and_in_memory_of_their_own(tmp_path: Path) -> None:
    """Whoever replaces the file then does not change them."""
    write_adapter(lut_adapter(), tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter").tensors
    path = tmp_path / "adapter" / TENSOR_FILE
    path.write_bytes(bytes(path.stat().st_size))
    expected = lut_adapter().tensors
    assert list(found) == sorted(expected)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


# Rows and columns of Llama-2-7B's linears in one of its 32 blocks.
LLAMA2_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def test_tables_of_a_7b_model_are_small_beside_a_lora() -> None:
    """Of rank 16 on the same layers, as PEFT writes it: in float32."""
    config = LutConfig(base_digest="ab" * 32, base_model_name_or_path="")
    shapes = {f"layers.{i}.{j}": shape for i in range(32) for j, shape in enumerate(LLAMA2_7B)}
    lora = sum(16 * (rows + columns) * 4 for rows, columns in shapes.values())
    assert lora == 159_907_840
    for bits, share in {2: 0.07, 3: 0.14, 4: 0.28}.items():
        tensors = {
            f"{name}.tables": torch.empty(rows, 1, 2**bits, dtype=torch.float16, device="meta")
            for name, (rows, _) in shapes.items()
        }
        assert share - 0.02 < Adapter(config, tensors).nbytes / lora < share
