"""What a layer is said to lose at each number of bits, which --target-bits goes by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spallm_serve.compressor import block as block_module
from spallm_serve.compressor.block import BlockPair, measure_block
from spallm_serve.compressor.plan import make_plan
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.compressor.streaming import BlockInputs
from spallm_serve.models import decoder_blocks
from tests.compressor.test_streaming import opened, small_batches  # noqa: F401 (a fixture)

QUICK = CompressSettings(estimator_rank=0, samples=8, seqlen=8)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_losses_fall_with_bits_and_the_block_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    model, _, inputs = opened(name, tmp_path)
    prefix, blocks = decoder_blocks(model)
    before = {key: value.clone() for key, value in blocks[0].state_dict().items()}
    alone = BlockInputs(list(inputs.hidden), inputs.calls, inputs.returns_tuple)
    with torch.no_grad():
        alone.advance(blocks[0], 0)
    planned = make_plan(model, QUICK).layers
    mine = {key for key in planned if key.startswith(f"{prefix}.0.")}
    losses = measure_block(BlockPair(f"{prefix}.0", 0, blocks[0], inputs), planned, QUICK)
    assert set(losses) == mine
    for by_bits in losses.values():
        assert by_bits[2] > by_bits[3] > by_bits[4] > 0
    for key, value in blocks[0].state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(torch.cat(inputs.hidden), torch.cat(alone.hidden))


def test_a_loss_is_how_far_the_blocks_output_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token's activations are a thousand times the others'; it counts as one token."""
    model, _, inputs = opened("llama", tmp_path)
    prefix, blocks = decoder_blocks(model)
    inputs.hidden[0] = inputs.hidden[0].clone()
    inputs.hidden[0][0, 0] *= 1000
    first = BlockInputs([inputs.hidden[0]], inputs.calls)
    sketches = []
    real = block_module.Sketch.copy_to
    monkeypatch.setattr(
        block_module.Sketch, "copy_to", lambda s, w: (sketches.append(s), real(s, w))[1]
    )
    planned = make_plan(model, QUICK).layers
    losses = measure_block(BlockPair(f"{prefix}.0", 0, blocks[0], inputs), planned, QUICK)
    name = f"{prefix}.0.mlp.down_proj"
    used = {sketch.bits: sketch for sketch in sketches[-3:]}
    down = blocks[0].mlp.down_proj
    with torch.no_grad():
        wanted = first.run(blocks[0], 0, 0).double()
        for bits, sketch in used.items():
            kept = down.weight.clone()
            down.weight.copy_(sketch.weight())
            moved = first.run(blocks[0], 0, 0).double() - wanted
            down.weight.copy_(kept)
            share = moved.square().sum(-1) / wanted.square().sum(-1)
            assert losses[name][bits] == pytest.approx(float(share.mean()), rel=1e-3)
