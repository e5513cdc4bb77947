"""What a route is told, and what the store answers it; refusals as those of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

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
from spallm_serve.server.body import read_json
from spallm_serve.server.errors import ApiError

_Answer = TypeVar("_Answer")
_Told = TypeVar("_Told", bound=BaseModel)
_BODY_BYTES, _BODY_SECONDS = 4096, 10.0
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


async def told(request: Request, model: type[_Told]) -> _Told:
    """The small JSON body of a request, as a model.

    Raises:
        ApiError: it is none, or too large, or late.
    """
    body = await read_json(request.receive, _BODY_BYTES, _BODY_SECONDS)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise ApiError(400, f"{field}: {problem['msg']}", "invalid_request", param=field) from error
