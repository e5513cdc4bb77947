"""Real transformers architectures through the whole pipeline and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spallm_serve.checkpoint import CODES, TABLES, read_sketch_config, sketch_names
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.layers import SketchedEmbedding, SketchedLinear, TiedHead
from spallm_serve.shards import ShardReader
from spallm_serve.sketch import Sketch
from tests.tiny_models import CONFIGS, save_tiny

pytestmark = pytest.mark.usefixtures("without_report")

QUICK = {"samples": 4, "seqlen": 16, "estimator_rank": 2}


def run(source: Path, output: Path, **settings: object) -> None:
    chosen = CompressSettings.model_validate(QUICK | {"bits": 3} | settings)
    compress(str(source), output, chosen, SilentObserver())


def dense_twin(source: Path, compressed: Path) -> PreTrainedModel:
    """The original with every compressed weight overwritten by its sketch's, straight from disk."""
    twin = AutoModelForCausalLM.from_pretrained(source)
    reader = ShardReader(compressed)
    for name in sketch_names(reader):
        module = twin.get_submodule(name)
        transposed = isinstance(module, Conv1D)
        columns = module.weight.shape[0 if transposed else 1]
        sketch = Sketch(reader.read(name + CODES), reader.read(name + TABLES), columns)
        dense = sketch.weight()
        with torch.no_grad():
            module.weight.copy_(dense.T if transposed else dense)
    return twin.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("embeddings", [None, 4])
def test_loads_as_what_its_sketches_stand_for(
    name: str, embeddings: int | None, tmp_path: Path
) -> None:
    source = save_tiny(name, tmp_path / "source")
    run(source, tmp_path / "out", embeddings=embeddings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    twin = dense_twin(source, tmp_path / "out")
    ids = torch.randint(3, 131, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-4)
    generated = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, twin.generate(ids, max_new_tokens=4, do_sample=False))
    kinds = [type(module) for module in loaded.modules()]
    assert kinds.count(SketchedLinear) >= 3 * 4
    assert (SketchedEmbedding in kinds) == (embeddings is not None)
    tied = loaded.config.tie_word_embeddings
    assert (TiedHead in kinds) == (embeddings is not None and tied)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("embeddings", [None, 3])
def test_save_pretrained_round_trip(name: str, embeddings: int | None, tmp_path: Path) -> None:
    run(save_tiny(name, tmp_path / "source"), tmp_path / "out", embeddings=embeddings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    first, second = loaded.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert read_sketch_config(tmp_path / "out") == read_sketch_config(tmp_path / "again")


def test_overrides_skips_and_groups_are_loaded(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    run(
        source,
        tmp_path / "out",
        bits=2,
        groups_per_row=2,
        bits_for=(("*.down_proj", 4), ("*.layers.0.mlp.down_proj", 3)),
        skip=("*.layers.2.self_attn.*",),
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    blocks = loaded.model.layers
    assert [block.mlp.down_proj.codes.shape[0] for block in blocks] == [3, 4, 4]
    assert blocks[1].mlp.up_proj.tables.shape == (58, 2, 4)
    assert isinstance(blocks[2].self_attn.q_proj, torch.nn.Linear)
    original = AutoModelForCausalLM.from_pretrained(source)
    torch.testing.assert_close(
        blocks[2].self_attn.q_proj.weight, original.model.layers[2].self_attn.q_proj.weight
    )


def test_casting_a_loaded_model_keeps_codes_and_tables(tmp_path: Path) -> None:
    run(save_tiny("llama", tmp_path / "source"), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    layer = loaded.model.layers[0].mlp.up_proj
    before = layer.tables.clone()
    assert before.dtype == torch.float16
    ids = torch.tensor([[5, 6, 7]])
    assert loaded(ids).logits.dtype == torch.bfloat16
    block = loaded.model.layers[0].float()
    assert block.mlp.up_proj is layer
    assert torch.equal(layer.tables, before)
    assert layer.tables.dtype == torch.float16
    assert layer(torch.zeros(1, 36)).dtype == torch.float32
