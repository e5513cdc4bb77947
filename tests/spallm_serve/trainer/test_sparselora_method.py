"""SparseLoRA as the loop meets it: what it puts in, what comes out, what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from spallm_serve.adapter import LoraConfig, expect_kind, lora_modules
from spallm_serve.adapter_files import CONFIG_FILE, read_adapter, write_adapter
from spallm_serve.checkpoint import ESTIMATOR_FILE
from spallm_serve.errors import UserError
from spallm_serve.trainer.method import WarmUp
from spallm_serve.trainer.sparselora.layers import SparseMlp
from spallm_serve.trainer.sparselora.method import SparseLora
from spallm_serve.trainer.sparselora.settings import SparseLoraSettings
from tests.spallm_serve.trainer.sparselora_models import (
    SPARSE,
    loss_of,
    make_batch,
    prepared,
    sketched,
    tiny,
)
from tests.tiny_models import save_tiny

DIGEST = "ab" * 32


def logits(model: nn.Module) -> Tensor:
    batch = make_batch()
    with torch.no_grad():
        found: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


@pytest.mark.parametrize("base", ["dense", "sketched"])
@pytest.mark.parametrize("name", ["llama", "grouped", "qwen3"])
def test_nothing_changes_at_first(name: str, base: str) -> None:
    model = tiny(name) if base == "dense" else sketched(tiny(name), 2, 1)[1]
    before = logits(copy.deepcopy(model))
    _, parameters = prepared(model, trained=False)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    assert len(parameters) == 3 * 4 * 2
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())
    trained = {id(parameter) for parameter in parameters.values()}
    assert all(
        parameter.requires_grad == (id(parameter) in trained) for parameter in model.parameters()
    )


def test_parameters_are_named_after_their_modules() -> None:
    _, parameters = prepared(tiny("grouped"), targets=("v_proj",))
    assert set(parameters) == {
        f"model.layers.{layer}.self_attn.v_proj.lora_{part}.weight"
        for layer in range(3)
        for part in "AB"
    }


def test_without_sparsity_it_is_pefts_lora() -> None:
    """Bit for bit, gradients included."""
    batch = make_batch()
    ours, theirs = tiny("grouped").train(), tiny("grouped").train()
    _, parameters = prepared(ours, sparsity="none", alpha=6.0)
    config = PeftLoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    wrapped = get_peft_model(theirs, config)
    named = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            named[f"base_model.model.{name.replace('.weight', '.default.weight')}"].copy_(parameter)
    found, wanted = loss_of(ours, batch), loss_of(theirs, batch)
    assert torch.equal(found, wanted)
    found.backward()
    wanted.backward()
    for name, parameter in parameters.items():
        twin = named[f"base_model.model.{name.replace('.weight', '.default.weight')}"]
        assert torch.equal(parameter.grad, twin.grad), name


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_stock_peft_loads_the_adapter(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").requires_grad_(False)
    method, _ = prepared(model, targets=("q_proj", "v_proj", "o_proj"))
    model.train()
    wanted = logits(model.eval())
    write_adapter(method.adapter(DIGEST, "some/base"), tmp_path / "adapter")

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(logits(fresh), wanted, atol=1e-3)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), wanted, rtol=0, atol=1e-4)


def test_the_adapter_on_disk(tmp_path: Path) -> None:
    method, parameters = prepared(tiny("grouped"), alpha=6.0)
    write_adapter(method.adapter(DIGEST, "some/base"), tmp_path)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert fields["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert fields["base_model_name_or_path"] == "some/base"
    assert fields["base_digest"] == DIGEST
    assert (fields["peft_type"], fields["task_type"]) == ("LORA", "CAUSAL_LM")
    adapter = read_adapter(tmp_path, DIGEST)
    config = expect_kind(adapter, LoraConfig, "")
    assert (config.r, config.lora_alpha, config.scale) == (3, 6, 2)
    modules = lora_modules(adapter)
    assert len(modules) == 12
    for name, (a, b) in modules.items():
        assert torch.equal(a, parameters[name + ".lora_A.weight"])
        assert torch.equal(b, parameters[name + ".lora_B.weight"])
    with pytest.raises(UserError, match=r"another|was made for the base"):
        read_adapter(tmp_path, "cd" * 32)


def test_an_adapter_is_a_copy() -> None:
    method, parameters = prepared(tiny("grouped"))
    first = method.adapter(None, "")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    second = method.adapter(None, "")
    assert all(not torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_estimators_come_from_the_checkpoint_or_are_kept(tmp_path: Path) -> None:
    cache, checkpoint = tmp_path / "cache.safetensors", tmp_path / "checkpoint"
    settings = SparseLoraSettings.model_validate({"sparsity": SPARSE, "estimator_rank": 2})
    SparseLora(settings, cache).prepare(tiny("grouped"), {})
    assert cache.is_file()
    checkpoint.mkdir()
    given = {}
    for layer, names in ((0, "mlp"), (1, "mlp"), (1, "self_attn"), (2, "self_attn")):
        linears = {"gate_proj": 40, "up_proj": 40} if names == "mlp" else {
            "q_proj": 24, "k_proj": 8, "v_proj": 8,
        }  # fmt: skip
        for linear, outputs in linears.items():
            module = f"model.layers.{layer}.{names}.{linear}"
            given[module + ".estimator_a"] = torch.ones(24, 5)
            # The last channels matter most.
            given[module + ".estimator_b"] = (
                torch.arange(outputs).expand(5, -1).float().contiguous()
            )
    save_file(given, checkpoint / ESTIMATOR_FILE)
    model = tiny("grouped")
    SparseLora(settings, cache, checkpoint).prepare(model, {})
    mlp = model.get_submodule("model.layers.0.mlp")
    assert isinstance(mlp, SparseMlp)
    assert mlp.choose(torch.ones(4, 24)).tolist() == list(range(20, 40))


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi"])
def test_architectures_of_other_names(name: str) -> None:
    with pytest.raises(UserError, match="self_attn") as error:
        prepared(tiny(name), sparsity="o2")
    assert "q_proj" in str(error.value)
    assert "o_proj" in str(error.value)


def test_other_architectures_can_have_plain_lora() -> None:
    model = tiny("phi")
    before = logits(copy.deepcopy(model))
    method, _ = prepared(model, trained=False, targets=("q_proj", "dense", "fc1"), sparsity="none")
    method.on_batch(make_batch(), 0.5)
    torch.testing.assert_close(logits(model.train()), before, rtol=0, atol=1e-6)
    assert method.savings(0.9).flops == 1.0


def test_a_target_no_block_has() -> None:
    with pytest.raises(UserError, match="no linear layer called qkv_proj, w1 to put a LoRA on"):
        prepared(tiny("grouped"), targets=("q_proj", "qkv_proj", "w1"))


def test_lora_on_a_sparse_mlp() -> None:
    with pytest.raises(
        UserError, match=r"layers\.0\.mlp: a sparse MLP cannot have a LoRA on up_proj"
    ):
        prepared(tiny("grouped"), targets=("q_proj", "up_proj"))
    _, parameters = prepared(
        tiny("grouped"), targets=("q_proj", "up_proj"), sparsity={"layers.1.self_attn": 0.5}
    )
    assert any("up_proj" in name for name in parameters)


def test_an_mlp_that_computes_something_else() -> None:
    model = tiny("grouped")
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x))
    with pytest.raises(UserError, match=r"layers\.0\.mlp: .* down_proj\(act_fn\(gate_proj"):
        prepared(model)


def test_an_attention_of_other_widths() -> None:
    model = tiny("grouped")
    model.get_submodule("model.layers.1.self_attn").v_proj = nn.Linear(24, 16)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn: .* head_dim"):
        prepared(model)


def test_a_layer_the_model_lacks() -> None:
    with pytest.raises(UserError, match=r"layers\.3\.mlp: the model has 3 layers"):
        prepared(tiny("grouped"), sparsity={"layers.3.mlp": 0.5})


def never(batch: dict[str, Tensor]) -> Tensor:
    raise AssertionError


def test_auto_measures_and_leaves_the_model_as_it_was() -> None:
    model = tiny("grouped")
    model.get_submodule("model.layers.2").train()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    printed = repr(model)
    method = SparseLora(SparseLoraSettings(sparsity="auto", start=0.0, rank=3))
    given = [make_batch(seed=seed) for seed in range(method.warm_up_batches)]
    assert given
    selection = method.select(model, WarmUp(iter(given), never))
    assert repr(model) == printed
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.stride() == strides[name], name
    assert set(selection) == {"sparsity.mlp", "sparsity.self_attn"}
    for sparsities in selection.values():
        assert sparsities.shape == (3,)
        assert sparsities[0] == sparsities[2] == 0
    method.prepare(model, selection)


def test_a_saved_selection_gives_the_same_layers() -> None:
    selection = {
        "sparsity.mlp": torch.tensor([0, 0.9, 0], dtype=torch.float64),
        "sparsity.self_attn": torch.zeros(3, dtype=torch.float64),
    }
    model = tiny("grouped")
    SparseLora(SparseLoraSettings(sparsity="auto")).prepare(model, selection)
    sparse = [name for name, m in model.named_modules() if isinstance(m, SparseMlp)]
    assert sparse == ["model.layers.1.mlp"]


def test_only_auto_needs_batches() -> None:
    method = SparseLora(SparseLoraSettings(sparsity="o1"))
    assert method.warm_up_batches == 0
    assert method.select(tiny("grouped"), WarmUp(iter(()), never)) == {}


@pytest.mark.parametrize("base", ["dense", "sketched"])
def test_training_goes_on_bit_for_bit_after_a_restart(base: str) -> None:
    def fresh() -> PreTrainedModel:
        return tiny("grouped") if base == "dense" else sketched(tiny("grouped"), 3, 1)[1]

    def step(
        model: PreTrainedModel, method: SparseLora, optimizer: torch.optim.Optimizer, number: int
    ) -> None:
        batch = make_batch(seed=number)
        method.on_batch(batch, number / 4)
        optimizer.zero_grad()
        loss_of(model.train(), batch).backward()
        optimizer.step()

    model = fresh()
    method, parameters = prepared(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for number in range(2):
        step(model, method, optimizer, number)
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    saved_optimizer = copy.deepcopy(optimizer.state_dict())
    for number in range(2, 4):
        step(model, method, optimizer, number)

    again = fresh()
    method, resumed = prepared(again)
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(saved[name])
    optimizer = torch.optim.AdamW(resumed.values(), lr=1e-2)
    optimizer.load_state_dict(saved_optimizer)
    for number in range(2, 4):
        step(again, method, optimizer, number)
    for name, parameter in resumed.items():
        assert torch.equal(parameter, parameters[name]), name
