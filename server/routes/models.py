"""``/v1/models``: what the one who asks can use, and nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from spallm_serve.adapters_store.records import Principal, Version
from spallm_serve.server import runtime
from spallm_serve.server.errors import model_not_found
from spallm_serve.server.gate import PRINCIPAL
from spallm_serve.server.routes.asking import asked


async def list_models(request: Request) -> Response:
    """The base, if the tenant may use it, its own adapters and those shared with it."""
    cards = await asked(partial(_cards, request.scope[PRINCIPAL]))
    return JSONResponse({"object": "list", "data": cards})


async def get_model(request: Request) -> Response:
    """One of them, by any name that a request may use.

    Raises:
        ApiError: 404.
    """
    principal: Principal = request.scope[PRINCIPAL]
    model = request.path_params["model"]
    here = runtime.current()
    resolved = await asked(partial(here.directory.resolve, principal.tenant, model))
    if resolved is None:
        raise model_not_found(model)
    return JSONResponse(_card(model, 0, resolved.engine_name))


def _cards(principal: Principal) -> list[dict[str, Any]]:
    here = runtime.current()
    base = here.directory.resolve(principal.tenant, here.settings.name)
    cards = [] if base is None else [_card(here.settings.name, 0, base.engine_name)]
    for adapter in here.store.adapters.list_visible(principal.tenant):
        if adapter.released is not None:
            cards.append(_version_card(f"{adapter.owner}/{adapter.name}", adapter.released))
    return cards


def _version_card(name: str, version: Version) -> dict[str, Any]:
    card = _card(name, int(version.created_at.timestamp()), version.engine_name)
    return card | {"parent": runtime.current().settings.name, "kind": version.kind}


def _card(name: str, created: int, root: str) -> dict[str, Any]:
    owner = name.partition("/")[0] if "/" in name else "spallm"
    return {"id": name, "object": "model", "created": created, "owned_by": owner, "root": root}
