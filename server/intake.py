"""How many uploads there are at a time, and the threads that check and store them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from spallm_serve.server.background import step_back
from spallm_serve.server.errors import ApiError

_Answer = TypeVar("_Answer")


class Intake:
    """Uploads' turns.

    An upload takes disk while it comes and seconds while it is checked. So there are only so many,
    of one tenant half of them; and they have threads of their own, for everybody's requests wait
    for those in which the store is asked.

    Args:
        at_once: uploads at a time.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once, self._of_one = at_once, max(1, at_once // 2)
        # One more for each: what a client that went away has begun runs to its end.
        self._threads = ThreadPoolExecutor(2 * at_once, "upload", initializer=step_back)
        self._running: Counter[str] = Counter()

    @contextmanager
    def turn(self, tenant: str) -> Iterator[None]:
        """While open, one more upload of a tenant is there.

        Raises:
            ApiError: there are too many; 429 with ``Retry-After``.
        """
        mine, all_of_them = self._running[tenant], self._running.total()
        if mine >= self._of_one:
            raise _busy(f"{mine} uploads of yours are on their way, no more are allowed")
        if all_of_them >= self._at_once:
            raise _busy(f"{all_of_them} uploads are on their way, this server takes no more")
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]

    async def run(self, question: Callable[[], _Answer]) -> _Answer:
        """Ask what takes long, in a thread that nobody else waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, question)


def _busy(message: str) -> ApiError:
    return ApiError(
        429, f"{message}; try again in 1 s", "rate_limit_exceeded", headers={"Retry-After": "1"}
    )
