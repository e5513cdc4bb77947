"""The gate in front of the engine's HTTP server: who is it, may it, and which adapter is meant."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from spallm_serve.adapters_store.failures import StoreError
from spallm_serve.adapters_store.records import Principal, Resolved
from spallm_serve.server.access_log import log_request
from spallm_serve.server.body import read_json, with_body
from spallm_serve.server.directory import Directory
from spallm_serve.server.errors import ApiError, forbidden, model_not_found, not_found, unauthorized
from spallm_serve.server.limits import TenantLimiter
from spallm_serve.server.metering import Meter
from spallm_serve.server.metrics import TenantMetrics
from spallm_serve.server.request_policy import RequestCaps, prepare_request
from spallm_serve.server.responding import CLIENT_WENT_AWAY, Responding
from spallm_serve.server.salt import cache_salt
from spallm_serve.server.scopes import PROBES, Route, declared

PRINCIPAL = "spallm.principal"
ADAPTER_HEADER = "x-spallm-adapter"
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_MAX_MODEL_NAME = 512
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class GateSettings:
    """What the gate is told.

    Attributes:
        secret: of the tenants' cache salts, at least 32 bytes.
        body_bytes: of a request to a model, at most.
        body_seconds: until such a request has to be complete.
        caps: limits of one request.
        anonymous: who everybody without a key is; None lets nobody in.
    """

    secret: bytes
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    caps: RequestCaps = field(default_factory=RequestCaps)
    anonymous: Principal | None = None


class Gate:
    """ASGI middleware around the engine's server.

    A request without a valid key gets 401 whatever it asks for; one for a route that is not
    declared 404; one that its key has no scope for 403. The ``model`` of a request is resolved
    among what the tenant may use; then the request is given the tenant's cache salt, and counted.

    Args:
        app: the engine's server.
        directory: of tenants and adapters.
        limiter: of requests and tokens.
        metrics: of tenants.
        held: a context inside which the engine has an adapter in memory.
        settings: see :class:`GateSettings`.
    """

    def __init__(
        self,
        app: ASGIApp,
        directory: Directory,
        limiter: TenantLimiter,
        metrics: TenantMetrics,
        held: Callable[[Resolved], AbstractAsyncContextManager[None]],
        settings: GateSettings,
    ) -> None:
        self._app = app
        self._directory = directory
        self._limiter = limiter
        self._metrics = metrics
        self._held = held
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        respond = Responding(send, {REQUEST_ID_HEADER: _request_id(scope)})
        arrived = time.perf_counter()
        try:
            await self._handle(scope, receive, respond)
        except ApiError as error:
            respond.facts["code"] = error.code
            if respond.started:
                raise
            await error.response()(scope, receive, respond)
        finally:
            _log(scope, respond, time.perf_counter() - arrived)

    async def _handle(self, scope: Scope, receive: Receive, respond: Responding) -> None:
        method, path = scope["method"], scope["path"]
        route = declared(method, path)
        if route is not None and route.scope is None:
            await self._app(scope, receive, respond)
            return
        principal = await self._principal(scope)
        respond.facts |= {"tenant": principal.tenant, "key": principal.key_id}
        if route is None:
            raise not_found(path)
        if route.scope is not None and not principal.may(route.scope):
            raise forbidden(route.scope)
        # Routed by what was judged: under a root path the engine would route by the rest of it.
        scope = {**scope, PRINCIPAL: principal, "root_path": ""}
        if not route.names_model:
            await self._app(scope, receive, respond)
            return
        await self._infer(scope, receive, respond, route, principal)

    async def _principal(self, scope: Scope) -> Principal:
        bearer = _bearer(Headers(scope=scope))
        if bearer is None and self._settings.anonymous is not None:
            return self._settings.anonymous
        if not bearer:
            raise unauthorized()
        principal = await _asked(self._directory.authenticate, bearer)
        if principal is None:
            raise unauthorized()
        return principal

    async def _infer(
        self,
        scope: Scope,
        receive: Receive,
        respond: Responding,
        route: Route,
        principal: Principal,
    ) -> None:
        quota = await _asked(self._directory.quota, principal.tenant)
        async with AsyncExitStack() as running:
            running.enter_context(respond.watched(self._metrics.watch(principal.tenant)))
            respond.headers |= await running.enter_async_context(
                self._limiter.admitted(principal.tenant, quota)
            )
            body = await read_json(receive, self._settings.body_bytes, self._settings.body_seconds)
            resolved = await self._resolve(principal, body)
            salt = cache_salt(self._settings.secret, principal.tenant)
            prepared = prepare_request(body, resolved.engine_name, salt, self._settings.caps)
            await running.enter_async_context(self._held(resolved))
            respond.meter = _meter(prepared, route, scope["path"])
            respond.headers[ADAPTER_HEADER] = resolved.engine_name
            respond.facts["adapter"] = resolved.engine_name
            request_id = {REQUEST_ID_HEADER: respond.headers[REQUEST_ID_HEADER]}
            scope, receive = with_body(scope, receive, prepared, request_id)
            guessed = int(Headers(scope=scope)["content-length"]) if route.generates else 0
            try:
                await self._app(scope, receive, respond)
            finally:
                if respond.status == 200:
                    usage = respond.counted(guessed)
                    self._directory.record(principal.tenant, resolved, usage)
                    await self._limiter.charge(principal.tenant, quota, usage.total)

    async def _resolve(self, principal: Principal, body: dict[str, Any]) -> Resolved:
        model = body.get("model")
        if not isinstance(model, str) or not 0 < len(model) <= _MAX_MODEL_NAME:
            raise ApiError(
                400, "model: expected the name of a model", "missing_model", param="model"
            )
        resolved = await _asked(self._directory.resolve, principal.tenant, model)
        if resolved is None:
            raise model_not_found(model)
        return resolved


async def _asked(question: Callable[..., _Answer], *arguments: str) -> _Answer:
    """The directory's answer; one that cannot be had now is not a refusal."""
    try:
        return await asyncio.to_thread(question, *arguments)
    except StoreError as error:
        raise ApiError(
            503,
            "the store of tenants and adapters does not answer; try again",
            "store_unavailable",
            headers={"Retry-After": "1"},
        ) from error


def _log(scope: Scope, respond: Responding, seconds: float) -> None:
    if declared(scope["method"], scope["path"]) in PROBES:
        return
    usage = respond.usage
    log_request(
        {
            "request_id": respond.headers[REQUEST_ID_HEADER],
            "method": scope["method"],
            "path": scope["path"],
            "status": respond.status or CLIENT_WENT_AWAY,
            "seconds": round(seconds, 4),
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            **respond.facts,
        }
    )


def _meter(body: dict[str, Any], route: Route, path: str) -> Meter:
    """A meter for a request's response; it may ask the engine for what it needs to see."""
    streamed = bool(body.get("stream"))
    hide_usage = False
    if streamed and path.endswith("/completions"):
        options = body.get("stream_options")
        options = dict(options) if isinstance(options, dict) else {}
        hide_usage = not options.get("include_usage")
        body["stream_options"] = options | {"include_usage": True}
    return Meter(streamed, hide_usage)


def _bearer(headers: Headers) -> str | None:
    """The key that was sent: OpenAI's clients send a bearer token, Anthropic's a header."""
    if "authorization" in headers:
        kind, _, token = headers["authorization"].partition(" ")
        return token.strip() if kind.lower() == "bearer" else ""
    return headers.get("x-api-key")


def _request_id(scope: Scope) -> str:
    """The client's own id if it is a plain one, else a new one."""
    given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
