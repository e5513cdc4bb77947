"""Calls deep in the stack do not map memory anew each time."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from spallm_serve.server.stack_room import with_stack_room

_CALLS = 500
_DEPTHS = range(1, 300)  # more than a chunk of frames


def _leaf(
    a: int = 1, b: int = 2, c: int = 3, d: int = 4, e: int = 5, f: int = 6, g: int = 7, h: int = 8
) -> int:
    return a + b + c + d + e + f + g + h


def _faults(depth: int) -> int:
    """Pages mapped while a frame so deep in the stack calls another again and again."""
    if depth:
        return _faults(depth - 1)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(_CALLS):
        _leaf()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def _most(faults: Callable[[int], int]) -> int:
    return max(faults(depth) for depth in _DEPTHS)


def test_no_depth_maps_memory_with_each_call() -> None:
    assert _most(with_stack_room(_faults)) < _CALLS // 2


def test_without_room_some_depth_does() -> None:
    if _most(_faults) < _CALLS:
        pytest.skip("this interpreter keeps a chunk of its stack")


def test_it_is_the_function_it_was() -> None:
    def shared(first: int, *rest: int, scale: int = 1) -> int:
        """What it says."""
        return scale * (first + sum(rest))

    roomy = with_stack_room(shared)
    assert roomy(1, 2, 3, scale=2) == 12
    assert roomy.__doc__ == shared.__doc__
    with pytest.raises(TypeError, match="first"):
        roomy()  # type: ignore[call-arg]
