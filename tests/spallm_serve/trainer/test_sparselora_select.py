"""Choosing channels, against loops over heads, pairs and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from spallm_serve.trainer.sparselora.select import (
    Factors,
    kept_count,
    kept_pairs,
    mlp_scores,
    pair_channels,
    query_channels,
    query_key_scores,
    strongest,
    value_scores,
)

WIDTH, TOKENS, RANK = 10, 7, 3


def factors(outputs: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(WIDTH, RANK, generator=generator),
        torch.randn(RANK, outputs, generator=generator),
    )


def tokens() -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))


def estimated(x: Tensor, pair: Factors) -> list[list[float]]:
    return (x.double() @ pair.a.double() @ pair.b.double()).tolist()


@pytest.mark.parametrize(
    ("channels", "sparsity", "kept"),
    [(100, 0.9, 10), (100, 0.97, 3), (14336, 0.99, 143), (58, 0.97, 1), (4, 0.99, 1), (9, 0.5, 4)],
)
def test_how_many_are_kept(channels: int, sparsity: float, kept: int) -> None:
    assert kept_count(channels, sparsity) == kept


def test_pairs_kept_are_half_the_channels_and_at_least_one() -> None:
    assert kept_pairs(12, 0.5) == 3
    assert kept_pairs(12, 0.25) == 4  # of nine channels
    assert kept_pairs(12, 0.97) == 1


@given(st.data())
def test_the_strongest_come_in_order_and_none_left_out_is_stronger(data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=40))  # many are equal
    count = data.draw(st.integers(1, len(scores)))
    found = strongest(torch.tensor(scores, dtype=torch.float32), count).tolist()
    assert len(found) == count and found == sorted(set(found))
    assert sorted(scores[place] for place in found) == sorted(scores)[len(scores) - count :]


@pytest.mark.parametrize("bias", [False, True])
def test_mlp_scores(bias: bool) -> None:
    x, gate, up = tokens(), factors(6, 0), factors(6, 1)
    biases = (torch.linspace(-1, 1, 6), torch.linspace(2, -1, 6)) if bias else (None, None)
    gates, ups = estimated(x, gate), estimated(x, up)
    wanted = []
    for channel in range(6):
        total = 0.0
        for token in range(TOKENS):
            g, u = gates[token][channel], ups[token][channel]
            if bias:
                g, u = g + float(biases[0][channel]), u + float(biases[1][channel])  # type: ignore[index]
            total += (g / (1 + math.exp(-g)) * u) ** 2
        wanted.append(math.sqrt(total))
    found = mlp_scores(x, gate, up, F.silu, *biases)
    torch.testing.assert_close(found.tolist(), wanted, rtol=1e-4, atol=1e-4)


def test_value_scores() -> None:
    x, value = tokens(), factors(8, 2)
    rows = estimated(x, value)
    wanted = [math.sqrt(sum(row[channel] ** 2 for row in rows)) for channel in range(8)]
    torch.testing.assert_close(value_scores(x, value).tolist(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kv_heads", "groups", "head"), [(1, 1, 4), (2, 3, 4), (3, 2, 6)])
def test_query_key_scores(kv_heads: int, groups: int, head: int) -> None:
    x = tokens()
    query, key = factors(kv_heads * groups * head, 3), factors(kv_heads * head, 4)
    queries, keys = estimated(x, query), estimated(x, key)
    wanted = []
    for kv_head in range(kv_heads):
        for pair in range(head // 2):
            of_queries = of_keys = 0.0
            for token in range(TOKENS):
                for half in (0, head // 2):
                    of_keys += keys[token][kv_head * head + pair + half] ** 2
                    for group in range(groups):
                        query_head = kv_head * groups + group
                        of_queries += queries[token][query_head * head + pair + half] ** 2
            wanted.append(math.sqrt(of_queries) * math.sqrt(of_keys))
    found = query_key_scores(x, query, key, head)
    torch.testing.assert_close(found.tolist(), wanted, rtol=1e-4, atol=1e-4)


def test_a_pairs_score_is_the_same_after_rope() -> None:
    """A rotation within each pair, another one for each token."""
    x, head = torch.eye(WIDTH), 4
    query, key = factors(2 * head, 3), factors(head, 4)

    def rotated(pair: Factors) -> Factors:
        rows = (pair.a @ pair.b).view(WIDTH, -1, 2, head // 2)
        angle = torch.arange(WIDTH).view(-1, 1, 1)
        low, high = rows[:, :, 0], rows[:, :, 1]
        turned = torch.stack(
            [low * angle.cos() - high * angle.sin(), low * angle.sin() + high * angle.cos()], 2
        )
        return Factors(torch.eye(WIDTH), turned.reshape(WIDTH, -1))

    before = query_key_scores(x, query, key, head)
    after = query_key_scores(x, rotated(query), rotated(key), head)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_channels_of_pairs() -> None:
    # Heads of 6: pair 1 of head 0, pair 0 of head 1, pair 2 of head 2.
    found = pair_channels(torch.tensor([1, 3, 8]), 6)
    assert found.tolist() == [1, 4, 6, 9, 14, 17]


@pytest.mark.parametrize(("kv_heads", "groups", "head"), [(2, 1, 4), (2, 3, 4), (8, 4, 2)])
def test_query_channels_are_those_the_attention_multiplies(
    kv_heads: int, groups: int, head: int
) -> None:
    """As ``repeat_kv`` repeats key heads: query head i reads key head i // groups."""
    chosen = torch.arange(kv_heads * head)[:: 3 if head > 2 else 2]
    wanted = [
        query_head * head + channel
        for query_head in range(kv_heads * groups)
        for channel in range(head)
        if query_head // groups * head + channel in chosen.tolist()
    ]
    assert query_channels(chosen, head, groups).tolist() == wanted
