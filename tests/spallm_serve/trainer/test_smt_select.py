"""Scores against a dense gradient, the choice against a plain sort."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spallm_serve.trainer.smt.select import block_scores, blocks_in_share, select_blocks
from tests.spallm_serve.trainer.smt_models import naive_choice, naive_scores


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 9),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    size=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_scores_are_those_of_the_dense_gradient(
    tokens: int, rows: int, columns: int, size: int, dtype: torch.dtype
) -> None:
    dy, x = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, columns).to(dtype)
    found = block_scores(dy, x, size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive_scores(dy, x, size), rtol=1e-5, atol=1e-6)


def test_no_more_than_a_strip_of_the_gradient_is_ever_held() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                largest = max(largest, found.numel())
            return found

    with Watch():
        block_scores(torch.ones(2, 640), torch.ones(2, 330), 16)
    assert largest <= 16 * 336


scores = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5).flatmap(
    lambda shapes: st.tuples(
        *(
            st.lists(st.integers(0, 4), min_size=r * c, max_size=r * c).map(
                lambda values, r=r, c=c: torch.tensor(values, dtype=torch.float32).view(r, c)
            )
            for r, c in shapes
        )
    )
)


@given(given_scores=scores, data=st.data())
def test_the_largest_of_all_are_chosen(
    given_scores: tuple[Tensor, ...], data: st.DataObject
) -> None:
    # The names' own order is not the modules' order.
    named = {f"m{9 - number}": score for number, score in enumerate(given_scores)}
    count = data.draw(st.integers(1, sum(score.numel() for score in given_scores)))
    found = select_blocks(named, count)
    assert all(index.dtype == torch.int32 for index in found.values())
    assert {name: index.tolist() for name, index in found.items()} == naive_choice(named, count)
    assert list(found) == [name for name in named if name in found]


@given(given_scores=scores, data=st.data())
def test_kinds_get_equal_quotas(given_scores: tuple[Tensor, ...], data: st.DataObject) -> None:
    named = {f"m{number}": score for number, score in enumerate(given_scores)}
    kinds = {name: data.draw(st.sampled_from("qkv")) for name in named}
    count = data.draw(st.integers(1, sum(score.numel() for score in given_scores)))
    found = select_blocks(named, count, kinds)
    got, size = dict.fromkeys(kinds.values(), 0), dict.fromkeys(kinds.values(), 0)
    for name, score in named.items():
        got[kinds[name]] += len(found.get(name, ()))
        size[kinds[name]] += score.numel()
    assert sum(got.values()) == count
    # Whoever has less than another, and not by one, has given all it had.
    assert all(got[k] >= max(got.values()) - 1 or got[k] == size[k] for k in got)
    for kind in got:
        theirs = {name: score for name, score in named.items() if kinds[name] == kind}
        wanted = naive_choice(theirs, got[kind])
        assert {n: found[n].tolist() for n in found if kinds[n] == kind} == wanted


def test_the_larger_kinds_take_what_does_not_divide() -> None:
    ones = {"a": torch.ones(1, 9), "b": torch.ones(1, 9), "c": torch.ones(1, 1)}
    found = select_blocks(ones, 8, {name: name for name in ones})
    assert {name: len(index) for name, index in found.items()} == {"a": 4, "b": 3, "c": 1}


def test_a_share_buys_whole_blocks_and_at_least_one() -> None:
    assert blocks_in_share(10_000, 0.5, 10) == 50
    assert blocks_in_share(10_000, 0.509, 10) == 50
    assert blocks_in_share(100, 0.001, 64) == 1
