"""The store's answer to a route, or its refusal as one of HTTP's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from spallm_serve.adapters_store.failures import (
    ConflictError,
    DamagedError,
    ForbiddenError,
    NotFoundError,
    QuotaError,
    RejectedError,
    StoreError,
    UnavailableError,
)
from spallm_serve.server.errors import ApiError

_Answer = TypeVar("_Answer")
# The most particular first.
_STATUS: tuple[tuple[type[StoreError], int, str], ...] = (
    (RejectedError, 400, "invalid_adapter"),
    (NotFoundError, 404, "adapter_not_found"),
    (ForbiddenError, 403, "forbidden"),
    (ConflictError, 409, "conflict"),
    (QuotaError, 413, "quota_exceeded"),
    (UnavailableError, 503, "store_unavailable"),
    (DamagedError, 503, "store_damaged"),
    (StoreError, 400, "invalid_request"),
)


async def asked(
    question: Callable[[], _Answer],
    run: Callable[[Callable[[], _Answer]], Awaitable[_Answer]] = asyncio.to_thread,
) -> _Answer:
    """Ask the store, in a thread.

    Args:
        question: blocks.
        run: brings it into a thread.

    Raises:
        ApiError: what the store refuses, or that it cannot be asked now.
    """
    try:
        return await run(question)
    except StoreError as error:
        status, code = next(
            (status, code) for kind, status, code in _STATUS if isinstance(error, kind)
        )
        raise ApiError(status, str(error), code) from error
