"""The gate in front of the engine's HTTP server: who is it, may it, and which adapter is meant."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spallm_serve.adapters_store.failures import StoreError
from spallm_serve.adapters_store.records import Principal, Resolved
from spallm_serve.server.body import read_json, with_body
from spallm_serve.server.directory import Directory
from spallm_serve.server.errors import ApiError, forbidden, model_not_found, not_found, unauthorized
from spallm_serve.server.limits import TenantLimiter
from spallm_serve.server.metering import Meter, Usage
from spallm_serve.server.metrics import RequestWatch, TenantMetrics
from spallm_serve.server.request_policy import RequestCaps, prepare_request
from spallm_serve.server.salt import cache_salt
from spallm_serve.server.scopes import Route, declared

PRINCIPAL = "spallm.principal"
ADAPTER_HEADER = "x-spallm-adapter"
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_MAX_MODEL_NAME = 512
_CLIENT_WENT_AWAY = 499
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
        loaded: waits until the engine has an adapter in memory.
        settings: see :class:`GateSettings`.
    """

    def __init__(
        self,
        app: ASGIApp,
        directory: Directory,
        limiter: TenantLimiter,
        metrics: TenantMetrics,
        loaded: Callable[[Resolved], Awaitable[None]],
        settings: GateSettings,
    ) -> None:
        self._app = app
        self._directory = directory
        self._limiter = limiter
        self._metrics = metrics
        self._loaded = loaded
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        respond = _Responding(send, {REQUEST_ID_HEADER: _request_id(scope)})
        try:
            await self._handle(scope, receive, respond)
        except ApiError as error:
            if respond.started:
                raise
            await error.response()(scope, receive, respond)

    async def _handle(self, scope: Scope, receive: Receive, respond: _Responding) -> None:
        method, path = scope["method"], scope["path"]
        route = declared(method, path)
        if route is not None and route.scope is None:
            await self._app(scope, receive, respond)
            return
        principal = await self._principal(scope)
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
        respond: _Responding,
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
            await self._loaded(resolved)
            salt = cache_salt(self._settings.secret, principal.tenant)
            prepared = prepare_request(body, resolved.engine_name, salt, self._settings.caps)
            respond.meter = _meter(prepared, route, scope["path"])
            respond.headers[ADAPTER_HEADER] = resolved.engine_name
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


class _Responding:
    """``send`` with headers added, and the body metered."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self.headers = headers
        self.meter: Meter | None = None
        self.status = 0
        self.started = False
        self.complete = False
        self._watch: RequestWatch | None = None

    @contextmanager
    def watched(self, watch: RequestWatch) -> Iterator[None]:
        """While open, a request's clock runs."""
        self._watch = watch
        try:
            yield
        except ApiError as error:
            self.status = error.status
            raise
        finally:
            self._watch = None
            watch.finish(
                self.status or _CLIENT_WENT_AWAY, self.meter.usage if self.meter else Usage()
            )

    def counted(self, request_bytes: int) -> Usage:
        """The tokens, also where the client did not wait for them.

        The engine then answers nothing, or no more; a stream that is complete has its count.
        """
        if self.meter is None:
            return Usage()
        if not self.complete or not (self.meter.streamed or self.meter.usage.total):
            self.meter.abandon(request_bytes)
        return self.meter.usage

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            headers = MutableHeaders(raw=list(message.get("headers", [])))
            for name, value in self.headers.items():
                headers[name] = value
            if self.meter is not None and self.meter.hide_usage:
                del headers["content-length"]
            message = {**message, "headers": headers.raw}
        elif message["type"] == "http.response.body":
            message = self._metered(message)
        await self._send(message)

    def _metered(self, message: Message) -> Message:
        more = message.get("more_body", False)
        self.complete = not more
        if self.meter is None:
            return message
        if self._watch is not None and message.get("body"):
            self._watch.on_bytes(self.meter.streamed)
        body = self.meter.feed(message.get("body", b""))
        if not more:
            body += self.meter.finish()
        return {**message, "body": body}
