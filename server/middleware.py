"""The gate as vLLM makes it: a class that is given nothing but the application."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from starlette.types import ASGIApp

from spallm_serve.adapters_store.records import Resolved
from spallm_serve.server import runtime
from spallm_serve.server.gate import Gate, GateSettings
from spallm_serve.server.request_policy import RequestCaps


class TenantGate(Gate):
    """The gate of this process's server; for vLLM's option ``--middleware``."""

    def __init__(self, app: ASGIApp) -> None:
        here = runtime.current()
        told = here.settings

        def held(resolved: Resolved) -> AbstractAsyncContextManager[None]:
            return here.engine().held(resolved)

        super().__init__(
            app,
            here.directory,
            here.limiter,
            here.metrics,
            held,
            GateSettings(
                secret=here.secret,
                body_bytes=told.body_bytes,
                caps=RequestCaps(choices=told.max_choices, tokens=told.max_tokens),
                anonymous=here.anonymous,
            ),
        )
