"""``/v1/adapters``: a tenant's own adapters, uploaded, released, rolled back, shared, deleted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from spallm_serve.adapters_store.failures import StoreError
from spallm_serve.adapters_store.records import Principal
from spallm_serve.server import runtime
from spallm_serve.server.gate import PRINCIPAL
from spallm_serve.server.routes.asking import asked, told
from spallm_serve.server.upload import received

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Action(BaseModel):
    """What ``POST /v1/adapters/{name}`` is told to do.

    Attributes:
        action: ``release`` a version by its digest, ``rollback`` to the release before, ``share``
            with a tenant or stop it, make it ``public`` or private.
        digest: of the version to release.
        expected: the digest that is released now; with it nothing that somebody else has released
            in the meantime is undone.
        tenant: to share with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["release", "rollback", "share", "unshare", "publish", "unpublish"]
    digest: _Digest | None = None
    expected: _Digest | None = None
    tenant: str | None = Field(None, max_length=64)


async def put_adapter(request: Request) -> Response:
    """Store a version and release it: two parts, ``config`` and ``tensors``."""
    here, principal = runtime.current(), _principal(request)
    owner, name = _named(request)
    with here.intake.turn(principal.tenant):
        async with received(request, here.uploads, here.settings, here.intake.run) as upload:
            of_whom = principal, owner, name
            put = partial(here.store.put, *of_whom, upload.config, upload.tensors, frozen=True)
            found = await asked(put, here.intake.run)
    body = found.model_dump(mode="json") | {"model": found.version.engine_name}
    return JSONResponse(body, 201 if found.created else 200)


async def validate_adapter(request: Request) -> Response:
    """Say whether an upload would be taken; nothing of it is kept."""
    here, principal = runtime.current(), _principal(request)
    with here.intake.turn(principal.tenant):
        async with received(request, here.uploads, here.settings, here.intake.run) as upload:
            check = partial(here.store.validate, principal, upload.config, upload.tensors)
            found = await asked(check, here.intake.run)
    return JSONResponse(found.model_dump(mode="json", exclude={"config"}) | {"valid": True})


async def list_adapters(request: Request) -> Response:
    """All that the tenant may see."""
    here = runtime.current()
    found = await asked(partial(here.store.adapters.list_visible, _principal(request).tenant))
    return JSONResponse(
        {"object": "list", "data": [each.model_dump(mode="json") for each in found]}
    )


async def get_adapter(request: Request) -> Response:
    """One, with its releases where it is the tenant's own."""
    here, principal = runtime.current(), _principal(request)
    owner, name = _named(request)
    adapters = here.store.adapters
    found = await asked(partial(adapters.get, principal.tenant, owner, name))
    body: dict[str, Any] = found.model_dump(mode="json")
    if owner == principal.tenant:
        moves = await asked(partial(adapters.history, principal, owner, name))
        body["releases"] = [move.model_dump(mode="json") for move in moves]
    return JSONResponse(body)


async def delete_adapter(request: Request) -> Response:
    """Delete an adapter, or with ``?version=DIGEST`` one version that is not released."""
    here, principal = runtime.current(), _principal(request)
    owner, name = _named(request)
    version = request.query_params.get("version")
    adapters = here.store.adapters
    if version is None:
        gone = await asked(partial(adapters.delete, principal, owner, name))
    else:
        gone = [await asked(partial(adapters.delete_version, principal, owner, name, version))]
    return JSONResponse({"deleted": [each.engine_name for each in gone]})


async def act_on_adapter(request: Request) -> Response:
    """Move, share or publish an adapter; see :class:`Action`."""
    here, principal = runtime.current(), _principal(request)
    owner, name = _named(request)
    action = await told(request, Action)
    adapters = here.store.adapters
    of_whom = principal, owner, name
    does: dict[str, Callable[[], Any]] = {
        "release": lambda: adapters.move(*of_whom, _given(action, "digest"), action.expected),
        "rollback": lambda: adapters.rollback(*of_whom, action.expected),
        "share": lambda: adapters.share(*of_whom, _given(action, "tenant")),
        "unshare": lambda: adapters.unshare(*of_whom, _given(action, "tenant")),
        "publish": lambda: adapters.publish(*of_whom),
        "unpublish": lambda: adapters.publish(*of_whom, public=False),
    }
    done = await asked(does[action.action])
    return JSONResponse(
        {"done": action.action} | ({} if done is None else done.model_dump(mode="json"))
    )


def _principal(request: Request) -> Principal:
    principal: Principal = request.scope[PRINCIPAL]
    return principal


def _named(request: Request) -> tuple[str, str]:
    """Owner and name out of ``support`` or ``acme/support``; the store says what is no name."""
    owner, slash, name = request.path_params["name"].rpartition("/")
    return (owner, name) if slash else (_principal(request).tenant, name)


def _given(action: Action, field: str) -> str:
    value = getattr(action, field)
    if value is None:
        raise StoreError(f"{action.action} needs {field!r}")
    return str(value)
