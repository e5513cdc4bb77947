"""Exported blocks in stock PEFT give what they give here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_serve.adapter import Adapter, LutConfig, SmtConfig
from spallm_serve.errors import UserError
from spallm_serve.trainer.smt.method import attach
from spallm_serve.trainer.smt.peft_export import export_supertuning
from tests.spallm_serve.trainer.smt_models import batch, tiny

DIGEST = "0123456789abcdef" * 4
LAYER = "model.layers.{}.self_attn.{}_proj"
# 36 x 36 (q) and 12 x 36 (k, v) weights; ragged edges; unequal numbers; a weight taken whole.
INDICES = {
    LAYER.format(0, "v"): [[0, 0]],
    LAYER.format(1, "q"): [[0, 0], [1, 2], [3, 3], [3, 0]],
    LAYER.format(2, "v"): [[1, 3], [0, 1]],
}
WHOLE = {LAYER.format(2, "k"): [[row, column] for row in range(2) for column in range(4)]}


def adapter_of(indices: dict[str, list[list[int]]], size: int = 10) -> Adapter:
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, index in indices.items():
        tensors[f"{name}.blocks"] = torch.randn(len(index), size, size).half()
        tensors[f"{name}.block_index"] = torch.tensor(index, dtype=torch.int32)
    return Adapter(SmtConfig(base_digest=DIGEST, block_size=size), tensors)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch(9)["input_ids"], use_cache=False).logits
    return found


@pytest.mark.parametrize("indices", [INDICES, INDICES | WHOLE], ids=["sparse", "one whole"])
def test_stock_peft_computes_the_same(indices: dict[str, list[list[int]]], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = adapter_of(indices)
    base = tiny("llama", tmp_path).double()
    export_supertuning(adapter, base, tmp_path / "peft")
    ours = tiny("llama", tmp_path).double()
    attach(ours, adapter)
    wanted = logits(ours)
    assert not torch.allclose(wanted, logits(base))

    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    assert loaded.peft_config["default"].peft_type == "SUPERTUNING"
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), wanted, rtol=1e-10, atol=1e-10)


def test_entries_are_distinct_and_what_fills_up_is_zero(tmp_path: Path) -> None:
    adapter = adapter_of(INDICES)
    export_supertuning(adapter, tiny("llama", tmp_path), tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    counts = {}
    for name, index in INDICES.items():
        positions = tensors[f"base_model.model.{name}.supertuning_indices"]
        values = tensors[f"base_model.model.{name}.supertuning_values"]
        assert (positions.dtype, values.dtype) == (torch.int32, torch.float32)
        assert len(set(positions.tolist())) == len(positions) == len(values)
        assert int(values.count_nonzero()) <= len(index) * 100
        counts[name] = len(values)
    # The densest has 12 x 36 entries and blocks of (2 x 6) and (10 x 10).
    assert counts[LAYER.format(2, "v")] == counts[LAYER.format(0, "v")] == 112
    assert counts[LAYER.format(1, "q")] == 3 * 112 + 1
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(INDICES)


def test_shapes_are_enough(tmp_path: Path) -> None:
    export_supertuning(adapter_of(INDICES), tiny("llama", tmp_path).to("meta"), tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("model", "indices", "message"),
    [
        ("gpt2", {"transformer.h.0.attn.c_attn": [[0, 0]]}, "nn.Linear only, here is Conv1D"),
        ("llama-sketched", INDICES, "nn.Linear only, here is SketchedLinear"),
        ("llama", {"model.layers.7.self_attn.q_proj": [[0, 0]]}, "here is no such layer"),
        ("llama", {LAYER.format(0, "v"): [[2, 0]]}, r"\(2, 0\) is outside"),
    ],
)
def test_what_peft_cannot_load_is_refused(
    model: str, indices: dict[str, list[list[int]]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export_supertuning(adapter_of(indices), tiny(model, tmp_path), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_other_kinds_and_places_are_refused(tmp_path: Path) -> None:
    model: PreTrainedModel = tiny("llama", tmp_path)
    with pytest.raises(UserError, match="SPALLM_LUT"):
        export_supertuning(Adapter(LutConfig(base_digest=DIGEST), {}), model, tmp_path / "peft")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export_supertuning(adapter_of(INDICES), model, tmp_path / "file" / "peft")
