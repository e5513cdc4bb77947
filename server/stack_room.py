"""Room on the interpreter's stack for all that a step calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# In entries of 8 bytes. The chunk that is mapped for such a frame is the next power of two, 512
# KiB; what is left holds hundreds of frames.
_TALL = 40_000


def with_stack_room(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """Have everything a function calls fit in one piece of the interpreter's stack.

    CPython keeps Python frames in chunks of 16 KiB, maps one when a frame does not fit and unmaps
    it when that frame returns. A loop whose calls begin just at an edge maps and unmaps with every
    call, and to unmap stops all threads of the process: a model's step took a fifth longer, or did
    not, by how deep in the stack it happened to run. A frame that asks for a tall stack starts a
    chunk with room for all others above it.
    """

    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=_TALL)
    return functools.wraps(function)(call)
