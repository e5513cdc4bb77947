"""Blocks run one by one, with stops inside them, give what the whole model gives."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from greenlet import getcurrent, greenlet
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import spallm_serve.compressor.streaming as streaming
from spallm_serve.compressor.block_walk import BlockWalk, WaitingRoom, _held_bytes
from spallm_serve.compressor.streaming import (
    BlockInputs,
    InputGroup,
    capture_block_inputs,
    for_each_head_input,
    group_by_input,
    micro_batches,
)
from spallm_serve.errors import UserError
from spallm_serve.models import decoder_blocks, linears
from tests.tiny_models import CONFIGS, save_tiny

ATTENTION = [f"self_attn.{name}_proj" for name in "qkv"]
LLAMA = [
    (ATTENTION, True),
    (["self_attn.o_proj"], False),
    (["mlp.gate_proj", "mlp.up_proj"], True),
    (["mlp.down_proj"], False),
]
GROUPS: dict[str, list[tuple[list[str], bool]]] = dict.fromkeys(CONFIGS, LLAMA) | {
    "phi": [([*ATTENTION, "mlp.fc1"], True), (["self_attn.dense"], False), (["mlp.fc2"], False)],
    "gpt2": [
        (["attn.c_attn"], True),
        (["attn.c_proj"], False),
        (["mlp.c_fc"], True),
        (["mlp.c_proj"], False),
    ],
    "opt": [
        (ATTENTION, True),
        (["self_attn.out_proj"], False),
        (["fc1"], True),
        (["fc2"], False),
    ],
}
SAMPLES, SEQLEN = 6, 11


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MICRO_BATCH_TOKENS", 2 * SEQLEN)


def opened(name: str, directory: Path) -> tuple[PreTrainedModel, list[Tensor], BlockInputs]:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(name, directory)).eval()
    tokens = torch.randint(3, 131, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(3))
    batches = micro_batches(tokens, widest=64)
    assert len(batches) == 3
    return model, batches, capture_block_inputs(model, batches, torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_linears_that_share_an_input(name: str, tmp_path: Path) -> None:
    model, _, inputs = opened(name, tmp_path)
    expected = [InputGroup(names, follows_norm) for names, follows_norm in GROUPS[name]]
    _, blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        assert group_by_input(block, inputs, index) == expected
        assert not any(module._forward_pre_hooks for module in block.modules())
        inputs.advance(block, index)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_one_by_one_are_the_model(name: str, tmp_path: Path) -> None:
    model, batches, inputs = opened(name, tmp_path)
    with torch.no_grad():
        whole = model(input_ids=torch.cat(batches), output_hidden_states=True)
    _, blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        hidden = torch.cat(inputs.hidden)
        torch.testing.assert_close(hidden, whole.hidden_states[index], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            inputs.advance(block, index)
    read: list[Tensor] = []
    for_each_head_input(model, inputs, batches, read.append)
    with torch.no_grad():
        logits = model.get_output_embeddings()(torch.cat(read))
        torch.testing.assert_close(logits, whole.logits, rtol=1e-4, atol=1e-4)
        again = model(input_ids=torch.cat(batches)).logits
    assert torch.equal(again, whole.logits), "the model is not as it was"


def test_first_micro_batches_go_their_own_way(tmp_path: Path) -> None:
    model, _, inputs = opened("llama", tmp_path)
    block = decoder_blocks(model)[1][0]
    before = list(inputs.hidden)
    head = inputs.head(2)
    with torch.no_grad():
        head.advance(block, 0)
    assert len(head.hidden) == 2
    assert not torch.equal(head.hidden[0], before[0])
    assert all(a is b for a, b in zip(inputs.hidden, before, strict=True))


def test_blocks_that_are_not_called_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, _ = opened("llama", tmp_path)
    monkeypatch.setattr(model, "forward", lambda **inputs: None)
    with pytest.raises(UserError, match="not supported"):
        capture_block_inputs(model, batches, torch.float32)


@given(samples=st.integers(1, 40), seqlen=st.integers(1, 60))
def test_micro_batches_are_of_one_size(samples: int, seqlen: int) -> None:
    tokens = torch.arange(samples * seqlen).view(samples, seqlen)
    batches = micro_batches(tokens, widest=64)
    assert torch.equal(torch.cat(batches), tokens)
    assert len({batch.shape for batch in batches}) == 1
    assert batches[0].shape[0] == 1 or batches[0].numel() <= 2 * SEQLEN


def test_fewer_tokens_of_a_wide_model_run_at_a_time() -> None:
    widest = streaming._MICRO_BATCH_VALUES // SEQLEN
    assert [len(batch) for batch in micro_batches(torch.zeros(4, SEQLEN), widest)] == [1] * 4
    assert len(micro_batches(torch.zeros(4, SEQLEN), 8 * widest)) == 4


@torch.no_grad()
def reads(block: nn.Module, inputs: BlockInputs, index: int) -> tuple[dict[str, Tensor], Tensor]:
    """What each linear reads, and what the block gives, all micro batches together."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].clone())
        )
        for name, module in linears(block).items()
    ]
    outputs = [inputs.run(block, index, batch) for batch in range(len(inputs.hidden))]
    for handle in handles:
        handle.remove()
    return {name: torch.cat(tensors) for name, tensors in seen.items()}, torch.cat(outputs)


def stops_of(name: str) -> list[str]:
    return [names[0] for names, _ in GROUPS[name]]


# One of the three micro batches of the tiny models waits with about 15,000 bytes.
WAITING = {"all wait": 1 << 20, "some wait": 40_000, "none waits": 0}
waiting = pytest.mark.parametrize("waiting", WAITING.values(), ids=WAITING.keys())


def test_a_pass_is_charged_for_all_that_its_frames_keep() -> None:
    """Attention waiting in front of its last linear keeps queries, keys and values, too."""
    shared, main = torch.zeros(1000), getcurrent()

    def attention(x: Tensor) -> None:
        queries, keys = torch.zeros(300), [torch.zeros(50), x]
        view = queries[:10]
        main.switch(queries, keys, view)

    def block(x: Tensor) -> None:
        normed = x + 1
        attention(normed)

    walk = greenlet(block)
    walk.switch(shared)
    assert _held_bytes(walk, {shared.untyped_storage().data_ptr()}) == 4 * (1000 + 300 + 50)
    walk.throw()


@waiting
@pytest.mark.parametrize("name", ["llama", "phi", "gpt2", "opt", "gemma3"])
def test_walk_stops_at_what_the_linears_read(name: str, waiting: int, tmp_path: Path) -> None:
    model, _, inputs = opened(name, tmp_path)
    block = decoder_blocks(model)[1][0]
    wanted, output = reads(block, inputs, 0)
    stops = sorted(stops_of(name), key=list(wanted).index)
    with BlockWalk(block, inputs, 0, stops, WaitingRoom(waiting)) as walk:
        for stop in stops:
            assert torch.equal(torch.cat(list(walk.inputs_at(stop))), wanted[stop])
        walk.finish()
    assert torch.equal(torch.cat(inputs.hidden), output)
    assert not any(module._forward_pre_hooks for module in block.modules())


@waiting
@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])
def test_weights_changed_at_a_stop_count_from_there_on(
    name: str, waiting: int, tmp_path: Path
) -> None:
    model, _, inputs = opened(name, tmp_path)
    block = decoder_blocks(model)[1][1]
    inputs.hidden = [hidden * 0.7 for hidden in inputs.hidden]
    changed = copy.deepcopy(block)
    stops = sorted(stops_of(name), key=list(reads(block, inputs, 1)[0]).index)
    original, _ = reads(block, inputs, 1)
    start = BlockInputs(list(inputs.hidden), inputs.calls, inputs.returns_tuple)
    with BlockWalk(block, inputs, 1, stops, WaitingRoom(waiting)) as walk, torch.no_grad():
        for position, stop in enumerate(stops):
            wanted, _ = reads(changed, start, 1)
            assert torch.equal(torch.cat(list(walk.inputs_at(stop))), wanted[stop])
            assert (position == 0) == torch.equal(wanted[stop], original[stop])
            together = next(names for names, _ in GROUPS[name] if names[0] == stop)
            for linear in (each.get_submodule(n) for n in together for each in (block, changed)):
                linear.weight.mul_(-1.5)
        walk.finish()
    assert torch.equal(torch.cat(inputs.hidden), reads(changed, start, 1)[1])


@waiting
def test_a_last_stop_runs_each_pass_to_its_end(waiting: int, tmp_path: Path) -> None:
    model, _, inputs = opened("llama", tmp_path)
    block = decoder_blocks(model)[1][0]
    wanted, output = reads(block, inputs, 0)
    first, last = ATTENTION[0], "mlp.down_proj"
    room = WaitingRoom(waiting)
    with BlockWalk(block, inputs, 0, [first, last], room) as walk:
        assert torch.equal(torch.cat(list(walk.inputs_at(first))), wanted[first])
        given_there = list(walk.inputs_at(last, to_the_end=True))
        assert room.taken == 0
        # Their outputs are there already, and nothing is run a second time.
        assert torch.equal(torch.cat(inputs.hidden), output)
        walk.finish()
    assert torch.equal(torch.cat(given_there), wanted[last])
    assert torch.equal(torch.cat(inputs.hidden), output)


def test_two_walks_share_the_room(tmp_path: Path) -> None:
    """What waits is counted as it comes and goes, over both walks and all stops."""
    model, _, inputs = opened("llama", tmp_path)
    block = decoder_blocks(model)[1][0]
    stops = sorted(stops_of("llama"), key=list(reads(block, inputs, 0)[0]).index)
    other = BlockInputs(list(inputs.hidden), inputs.calls, inputs.returns_tuple)
    room = WaitingRoom(100_000)
    with (
        BlockWalk(block, inputs, 0, stops, room) as walk,
        BlockWalk(block, other, 0, stops, room) as beside,
    ):
        for stop in stops:
            for _ in zip(walk.inputs_at(stop), beside.inputs_at(stop), strict=True):
                held = [size for each in (walk, beside) for _, size in each._waiting.values()]
                assert 0 < sum(held) == room.taken <= room.capacity
    assert room.taken == 0


@pytest.mark.parametrize("consumed", [1, 3])
@pytest.mark.parametrize("error", [False, True])
def test_leaving_a_walk_early(consumed: int, error: bool, tmp_path: Path) -> None:
    model, _, inputs = opened("llama", tmp_path)
    block = decoder_blocks(model)[1][0]
    _, output = reads(block, inputs, 0)
    held: list[weakref.ref[Tensor]] = []
    try:
        with BlockWalk(block, inputs, 0, stops_of("llama"), WaitingRoom(1 << 20)) as walk:
            for _, given_there in zip(range(consumed), walk.inputs_at(ATTENTION[0]), strict=False):
                held.append(weakref.ref(given_there))
            del given_there
            if error:
                raise KeyError
    except KeyError:
        assert error
    gc.collect()
    assert len(held) == consumed
    assert all(tensor() is None for tensor in held), "a pass still holds its tensors"
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert torch.equal(reads(block, inputs, 0)[1], output)


def test_a_pass_does_not_go_back(tmp_path: Path) -> None:
    model, _, inputs = opened("llama", tmp_path)
    block = decoder_blocks(model)[1][0]
    with BlockWalk(block, inputs, 0, stops_of("llama"), WaitingRoom(1 << 20)) as walk:
        list(walk.inputs_at("mlp.down_proj"))
        with pytest.raises(RuntimeError, match=ATTENTION[0].replace(".", r"\.")):
            list(walk.inputs_at(ATTENTION[0]))
