"""What was used, and what is where."""

from __future__ import annotations

from datetime import date
from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from spallm_serve.adapters_store.records import Principal
from spallm_serve.server import runtime
from spallm_serve.server.errors import ApiError, model_not_found
from spallm_serve.server.gate import PRINCIPAL
from spallm_serve.server.routes.asking import asked, told


async def usage(request: Request) -> Response:
    """Requests and tokens by adapter and day; ``?from=``, ``?to=``, and for admins ``?tenant=``."""
    here = runtime.current()
    principal: Principal = request.scope[PRINCIPAL]
    query = request.query_params
    report = partial(
        here.store.usage.report,
        principal,
        tenant=query.get("tenant"),
        first=_day(query.get("from"), "from"),
        last=_day(query.get("to"), "to"),
    )
    await asked(here.usage.flush)
    rows = await asked(report)
    return JSONResponse({"object": "list", "data": [row.model_dump(mode="json") for row in rows]})


class Pin(BaseModel):
    """What ``POST /v1/residency`` is told to do.

    Attributes:
        action: ``pin`` what an adapter's name stands for now to a slot, or ``unpin`` it.
        adapter: ``owner/name``, or ``owner/name@digest``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["pin", "unpin"]
    adapter: str = Field(pattern="^[^/]+/[^/]+$", max_length=256)


async def residency(request: Request) -> Response:
    """What is in slots and in memory, worker by worker."""
    return JSONResponse({"workers": await runtime.current().engine().facts()})


async def pin(request: Request) -> Response:
    """Keep a version in a slot, or no longer; see :class:`Pin`."""
    here = runtime.current()
    wish = await told(request, Pin)
    owner = wish.adapter.partition("/")[0]
    resolved = await asked(partial(here.directory.resolve, owner, wish.adapter))
    if resolved is None:
        raise model_not_found(wish.adapter)
    engine = here.engine()
    await (engine.pin(resolved) if wish.action == "pin" else engine.unpin(resolved))
    return JSONResponse({"done": wish.action, "adapter": resolved.engine_name})


def _day(text: str | None, name: str) -> date | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ApiError(
            400,
            f"{name}: {text[:40]!r} is no day, expected YYYY-MM-DD",
            "invalid_value",
            param=name,
        ) from error
