"""Which tokens are computed sparsely, and in which order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spallm_serve.examples import IGNORED
from spallm_serve.trainer.sparselora.ops import join_tokens, split_tokens
from spallm_serve.trainer.sparselora.tokens import (
    SCORED_TOKENS,
    context_share,
    dense_tokens,
    split_batch,
)


def labels(*rows: str) -> Tensor:
    """``o`` is an output, ``.`` is not."""
    return torch.tensor([[5 if letter == "o" else IGNORED for letter in row] for row in rows])


def padded(*rows: str) -> dict[str, Tensor]:
    """As :func:`labels`, and ``_`` is padding."""
    shown = [row.replace("_", ".") for row in rows]
    mask = torch.tensor([[int(letter != "_") for letter in row] for row in rows])
    found = labels(*shown)
    return {"input_ids": found.clamp(min=0), "labels": found, "attention_mask": mask}


def test_outputs_and_what_predicts_them_are_dense() -> None:
    found = dense_tokens(labels("..oo...o.", "ooo......", "........o", "........."))
    shown = ["".join("d" if dense else "." for dense in row) for row in found.tolist()]
    assert shown == [".ddd..dd.", "ddd......", ".......dd", "........."]


def test_rows_do_not_reach_into_each_other() -> None:
    assert not dense_tokens(labels("...", "o.."))[0].any()


def test_labels_stay_as_they_were() -> None:
    given = labels("..o")
    dense_tokens(given)
    assert torch.equal(given, labels("..o"))


def test_context_share_counts_padding() -> None:
    assert context_share(padded("___..o", ".....o")["labels"]) == pytest.approx(8 / 12)


def test_split_orders_context_first_and_back() -> None:
    batch = padded("__..oo", "..o...")
    split = split_batch(batch)
    assert split is not None
    context = (~dense_tokens(batch["labels"])).flatten().nonzero().squeeze(1).tolist()
    assert split.context == len(context)
    assert split.order[: split.context].tolist() == context
    assert sorted(split.order.tolist()) == list(range(12))
    x = torch.randn(12, 3)
    assert torch.equal(join_tokens(*split_tokens(x, split), split), x)


def test_all_context_that_is_no_padding_is_looked_at_where_it_is_few() -> None:
    split = split_batch(padded("__..oo", "..o..."))
    assert split is not None
    assert split.scored.tolist() == [2, 6, 9, 10, 11]


def test_many_tokens_are_sampled_evenly_and_first_ones_always() -> None:
    rows = ["_" + "." * 99 + "o"] * 7
    split = split_batch(padded(*rows))
    assert split is not None
    firsts = {row * 101 + 1 for row in range(7)}
    found = set(split.scored.tolist())
    assert firsts <= found
    assert SCORED_TOKENS / 2 <= len(found) <= SCORED_TOKENS + 7
    gaps = split.scored.diff()
    assert int(gaps.max()) <= 9


def test_first_tokens_of_packed_sequences_are_looked_at() -> None:
    given = labels("." * 600)
    positions = torch.cat([torch.arange(333), torch.arange(267)])[None]
    split = split_batch({"labels": given, "position_ids": positions})
    assert split is not None
    assert {0, 333} <= set(split.scored.tolist())


def test_padding_is_not_looked_at_in_rows_with_positions_either() -> None:
    batch = padded("__...o", "....oo")
    batch["position_ids"] = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3]])
    split = split_batch(batch)
    assert split is not None
    assert split.scored.tolist() == [2, 3, 6, 7, 8]


def test_no_context_is_no_split() -> None:
    assert split_batch(padded("oo", "oo")) is None
    # The token before an output predicts it; what is left is padding, which no channels suit.
    assert split_batch(padded("__oo", "_.oo")) is None
