"""The method on real architectures: what it chooses, what it trains, what it leaves alone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spallm_serve.adapter import Adapter, LutConfig, SmtConfig
from spallm_serve.adapter_files import read_adapter, write_adapter
from spallm_serve.errors import UserError
from spallm_serve.layers import is_linear, weight_shape
from spallm_serve.models import decoder_blocks
from spallm_serve.trainer.method import Batch, WarmUp
from spallm_serve.trainer.smt.layers import SmtLinear
from spallm_serve.trainer.smt.method import DEFAULT_SHARE, Smt, SmtSettings, attach
from tests.spallm_serve.trainer.smt_models import (
    MODELS,
    attention_inputs,
    batch,
    naive_choice,
    naive_scores,
    tiny,
)

DIGEST = "0123456789abcdef" * 4
SIZE = 10  # divides none of the widths


def loss_of(model: PreTrainedModel, given: Batch) -> Tensor:
    logits = model(given["input_ids"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())


def warm_up(model: PreTrainedModel, count: int = 3) -> WarmUp:
    return WarmUp((batch(seed) for seed in range(count)), lambda given: loss_of(model, given))


def smt(name: str, **more: object) -> Smt:
    return Smt(
        SmtSettings(
            **({"block_size": SIZE, "modules": attention_inputs(name), "blocks": 8} | more)  # type: ignore[arg-type]
        )
    )


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch(9)["input_ids"], use_cache=False).logits
    return found


def train(model: PreTrainedModel, parameters: dict[str, nn.Parameter], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.05)
    for step in range(steps):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str, tmp_path: Path) -> PreTrainedModel:
    return tiny(name, tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> PreTrainedModel:
    return tiny("llama", tmp_path)


def oracle_scores(model: PreTrainedModel, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """From inputs and gradients of runs in which the embeddings start the graph."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def note(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        return note

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if is_linear(module) and name.endswith(endings)
    ]
    embeddings = model.get_input_embeddings()
    hooks.append(embeddings.register_forward_hook(lambda _, __, y: y.requires_grad_()))
    scores: dict[str, Tensor] = {}
    for seed in range(3):
        loss_of(model, batch(seed)).backward()
        for name, (x, y) in seen.items():
            assert y.grad is not None
            score = naive_scores(y.grad.flatten(0, 1), x.flatten(0, 1), SIZE)
            scores[name] = scores.get(name, 0) + score
    for hook in hooks:
        hook.remove()
    return scores


def test_chooses_the_blocks_of_largest_gradient(name: str, model: PreTrainedModel) -> None:
    scores = oracle_scores(model, attention_inputs(name))
    found = smt(name).select(model, warm_up(model))
    wanted = naive_choice(scores, 8)
    assert {key: index.tolist() for key, index in found.items()} == {
        f"{key}.block_index": places for key, places in wanted.items()
    }
    assert all(index.dtype == torch.int32 for index in found.values())


def test_choosing_leaves_the_model_as_it_was(name: str, model: PreTrainedModel) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = logits(model)
    smt(name).select(model, warm_up(model))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), wanted)
    assert logits(model).grad_fn is None


def test_hooks_go_also_when_the_warm_up_fails(llama: PreTrainedModel) -> None:
    def failing(given: Batch) -> Tensor:
        loss_of(llama, given)
        raise RuntimeError("out of memory, says the test")

    with pytest.raises(RuntimeError, match="says the test"):
        smt("llama").select(llama, WarmUp(iter([batch()]), failing))
    assert not any(module._forward_hooks for module in llama.modules())


def test_activations_do_not_outlive_their_batch(llama: PreTrainedModel) -> None:
    def held() -> int:
        gc.collect()
        shapes = ((2, 7, 36), (2, 7, 12), (14, 36))
        return sum(
            type(found) is Tensor and tuple(found.shape) in shapes for found in gc.get_objects()
        )

    before, counts = held(), []

    def batches() -> Iterator[Batch]:
        for seed in range(3):
            counts.append(held() - before)
            yield batch(seed)
        counts.append(held() - before)

    smt("llama").select(llama, WarmUp(batches(), lambda given: loss_of(llama, given)))
    assert counts == [0, 0, 0, 0]


def test_gradient_checkpointing_does_not_change_the_choice(llama: PreTrainedModel) -> None:
    wanted = smt("llama").select(llama, warm_up(llama))
    llama.gradient_checkpointing_enable()
    llama.train()
    found = smt("llama").select(llama, warm_up(llama))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_equal_quotas_for_each_kind(llama: PreTrainedModel) -> None:
    found = smt("llama", blocks=9, selection="per_kind").select(llama, warm_up(llama))
    for ending in attention_inputs("llama"):
        theirs = (i for key, i in found.items() if key.endswith(f"{ending}.block_index"))
        assert sum(map(len, theirs)) == 3


def test_blocks_of_the_mlp_too(llama: PreTrainedModel) -> None:
    method = smt("llama", modules=("mlp.down_proj", "v_proj"), blocks=24)
    found = method.select(llama, warm_up(llama))
    assert sum(map(len, found.values())) == 24
    assert all(key.removesuffix(".block_index").endswith(("down_proj", "v_proj")) for key in found)
    assert method.prepare(llama, found).keys() == {
        key.replace(".block_index", ".blocks") for key in found
    }


@pytest.mark.parametrize("share", [None, 0.1])
def test_a_share_is_of_all_linears_in_the_blocks(
    share: float | None, model: PreTrainedModel, name: str
) -> None:
    _, blocks = decoder_blocks(model)
    shapes = [weight_shape(module) for module in blocks.modules() if is_linear(module)]
    total = sum(rows * columns for rows, columns in shapes)
    found = smt(name, blocks=None, share=share, block_size=4).select(model, warm_up(model))
    assert sum(map(len, found.values())) == int(total * (share or DEFAULT_SHARE)) // 16


def test_prepared_blocks_change_no_bit(name: str, model: PreTrainedModel) -> None:
    wanted, method = logits(model), smt(name)
    parameters = method.prepare(model, method.select(model, warm_up(model)))
    assert torch.equal(logits(model), wanted)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == parameters
    for parameter_name, parameter in parameters.items():
        assert parameter_name.endswith(".blocks")
        assert parameter.dtype == torch.float32
        assert not parameter.any()


def merged(model: PreTrainedModel) -> None:
    """Fold the blocks of a dense model into its weights, and put its own layers back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SmtLinear):
            base, size = module.base, module.block_size
            assert isinstance(base, nn.Linear | Conv1D)
            weight = base.weight.data.T if isinstance(base, Conv1D) else base.weight.data
            for block, (row, column) in zip(
                module.blocks.data, module.block_index.tolist(), strict=True
            ):
                part = weight[row * size : (row + 1) * size, column * size : (column + 1) * size]
                part += block[: part.shape[0], : part.shape[1]]
            model.set_submodule(name, base)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
def test_training_is_that_of_the_merged_weights(name: str, model: PreTrainedModel) -> None:
    method = smt(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = method.prepare(model, method.select(model, warm_up(model)))
    first = float(loss_of(model, batch(0)).detach())
    train(model, parameters)
    assert float(loss_of(model, batch(0)).detach()) < first
    wanted = logits(model)
    state = {key.replace(".base.", "."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(state[key], before[key]) for key in before)
    merged(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_gives_the_trained_model(
    name: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    method = smt(name)
    parameters = method.prepare(model, method.select(model, warm_up(model)))
    train(model, parameters)
    wanted = logits(model)
    write_adapter(method.adapter(DIGEST, "owner/base"), tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", DIGEST)
    assert adapter.config.base_model_name_or_path == "owner/base"  # type: ignore[union-attr]
    for key, parameter in parameters.items():
        assert torch.equal(adapter.tensors[key], parameter.detach().half())
    other = tiny(name, tmp_path / "again")
    attach(other, adapter)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    torch.testing.assert_close(logits(other), wanted, rtol=1e-3, atol=5e-3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(parameter.half())
    assert torch.equal(logits(other), logits(model))


def test_the_same_choice_can_be_prepared_again(llama: PreTrainedModel, tmp_path: Path) -> None:
    method = smt("llama")
    selection = method.select(llama, warm_up(llama))
    twin, other = tiny("llama", tmp_path / "twin"), smt("llama")
    train(llama, method.prepare(llama, selection))
    train(twin, other.prepare(twin, selection))
    ours, theirs = method.adapter(DIGEST, ""), other.adapter(DIGEST, "")
    assert all(torch.equal(ours.tensors[key], theirs.tensors[key]) for key in ours.tensors)


def test_nothing_below_the_lowest_block_takes_part_in_the_backward_pass(
    name: str, model: PreTrainedModel
) -> None:
    prefix, blocks = decoder_blocks(model)
    lowest = next(
        f"{prefix}.1.{n}"
        for n, m in blocks[1].named_modules()
        if n.endswith(attention_inputs(name))
    )
    index = torch.zeros(1, 2, dtype=torch.int32)
    smt(name).prepare(model, {f"{lowest}.block_index": index})
    graph: dict[str, bool] = {}

    def note(module_name: str) -> None:
        def on_forward(_: nn.Module, __: object, output: object) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            assert isinstance(hidden, Tensor)
            graph[module_name] = hidden.grad_fn is not None

        model.get_submodule(module_name).register_forward_hook(on_forward)

    names = [f"{prefix}.{number}" for number in range(3)]
    for module_name in (*names, f"{lowest}.base", lowest):
        note(module_name)
    loss_of(model, batch()).backward()
    assert graph == {
        names[0]: False,
        f"{lowest}.base": False,
        lowest: True,
        names[1]: True,
        names[2]: True,
    }


def test_settings_give_one_amount() -> None:
    with pytest.raises(ValidationError, match="blocks or share"):
        SmtSettings(blocks=3, share=0.1)
    for bad in ({"blocks": 0}, {"share": 0}, {"share": 1.1}, {"block_size": 0}, {"colour": 1}):
        with pytest.raises(ValidationError):
            SmtSettings(**bad)  # type: ignore[arg-type]
    assert Smt(SmtSettings(warm_up_batches=5)).warm_up_batches == 5


def test_names_that_match_nothing(model: PreTrainedModel, name: str) -> None:
    method = smt(name, modules=(*attention_inputs(name), "wq"))
    there = "c_attn, c_fc, c_proj" if name == "gpt2" else "down_proj, gate_proj, k_proj, o_proj"
    with pytest.raises(UserError, match=rf"ends in 'wq'.* are {there}"):
        method.select(model, warm_up(model))
    with pytest.raises(UserError, match="ends in 'proj'"):
        smt(name, modules=("proj",)).select(model, warm_up(model))


def test_more_blocks_than_there_are(llama: PreTrainedModel) -> None:
    available = 3 * (4 * 4 + 2 * 2 * 4)
    smt("llama", blocks=available).select(llama, warm_up(llama))
    with pytest.raises(UserError, match=f"^{available + 1} blocks of 10 x 10 .* have {available};"):
        smt("llama", blocks=available + 1).select(llama, warm_up(llama))


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
def test_a_warm_up_without_usable_gradients(factor: float, llama: PreTrainedModel) -> None:
    useless = WarmUp(iter([batch()]), lambda given: loss_of(llama, given) * factor)
    with pytest.raises(UserError, match="warm-up"):
        smt("llama").select(llama, useless)


def test_a_value_beyond_float16_is_named(llama: PreTrainedModel) -> None:
    method = smt("llama")
    parameters = method.prepare(llama, method.select(llama, warm_up(llama)))
    key, parameter = next(iter(parameters.items()))
    with torch.no_grad():
        parameter[0, 0, 0] = 1e5
    with pytest.raises(UserError, match=rf"{key.removesuffix('.blocks')}: .*float16"):
        method.adapter(DIGEST, "")


V = "model.layers.1.self_attn.v_proj"


def adapter_of(tensors: dict[str, Tensor]) -> Adapter:
    good = {
        f"{V}.blocks": torch.ones(2, SIZE, SIZE, dtype=torch.float16),
        f"{V}.block_index": torch.tensor([[0, 0], [1, 3]], dtype=torch.int32),
    }
    present = {key: value for key, value in (good | tensors).items() if value.numel()}
    return Adapter(SmtConfig(base_digest=DIGEST, block_size=SIZE), present)


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "no such module": (
        {
            "model.layers.9.q_proj.blocks": torch.ones(1, SIZE, SIZE).half(),
            "model.layers.9.q_proj.block_index": torch.zeros(1, 2, dtype=torch.int32),
        },
        r"model\.layers\.9\.q_proj: the model has no such linear layer",
    ),
    "not a linear": (
        {
            "model.norm.blocks": torch.ones(1, SIZE, SIZE).half(),
            "model.norm.block_index": torch.zeros(1, 2, dtype=torch.int32),
        },
        r"model\.norm: .* no such linear layer",
    ),
    "no index": ({f"{V}.block_index": torch.empty(0)}, r"v_proj: needs both"),
    "no blocks": ({f"{V}.blocks": torch.empty(0)}, r"v_proj: needs both"),
    "something else": ({f"{V}.tables": torch.ones(1)}, r"v_proj\.tables: neither"),
    "another size": (
        {f"{V}.blocks": torch.ones(2, 8, 8).half()},
        r"\[2, 8, 8\] blocks .* block size 10",
    ),
    "another count": (
        {f"{V}.blocks": torch.ones(3, SIZE, SIZE).half()},
        r"\[3, 10, 10\] blocks and \[2, 2\] positions",
    ),
    "integers": ({f"{V}.blocks": torch.ones(2, SIZE, SIZE).int()}, "expected float16 .* got int32"),
    "out of range": ({f"{V}.block_index": torch.tensor([[0, 0], [2, 0]]).int()}, r"\(2, 0\)"),
    "twice": ({f"{V}.block_index": torch.tensor([[0, 1], [0, 1]]).int()}, "given twice"),
    "a single number": ({f"{V}.block_index": torch.tensor(1).int()}, "of 2 dimensions"),
    "int64": ({f"{V}.block_index": torch.tensor([[0, 1], [0, 0]])}, "expected int32"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_adapters_are_refused_whole(bad: str, llama: PreTrainedModel) -> None:
    tensors, message = BAD[bad]
    before = {name: type(module) for name, module in llama.named_modules()}
    with pytest.raises(UserError, match=message):
        attach(llama, adapter_of(tensors))
    assert {name: type(module) for name, module in llama.named_modules()} == before


def test_other_kinds_of_adapter_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="SPALLM_LUT"):
        attach(llama, Adapter(LutConfig(base_digest=DIGEST), {f"{V}.tables": torch.ones(1)}))


def test_blocks_are_attached_once(llama: PreTrainedModel) -> None:
    attach(llama, adapter_of({}))
    with pytest.raises(UserError, match="no such linear layer"):
        attach(llama, adapter_of({}))
