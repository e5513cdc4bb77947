"""Is the process alive, and does the engine decode: the two routes that need no key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

# An answer serves everybody for so long, or whoever asks without a key could keep the engine busy.
_FRESH_SECONDS = 1.0


class Readiness:
    """Whether a real token can be decoded now.

    Args:
        decode: makes the engine decode one token.
        seconds: in which it has to.
    """

    def __init__(self, decode: Callable[[], Awaitable[None]], seconds: float) -> None:
        self._decode, self._seconds = decode, seconds
        self._lock = asyncio.Lock()
        self._asked = -float("inf")
        self._problem: str | None = "the engine has not been asked yet"

    async def problem(self) -> str | None:
        """Why no request should be sent here; None if all is well."""
        async with self._lock:
            if time.monotonic() - self._asked > _FRESH_SECONDS:
                self._problem = await self._ask()
                self._asked = time.monotonic()
            return self._problem

    async def _ask(self) -> str | None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._decode()
        except TimeoutError:
            return f"no token was decoded within {self._seconds:g} s"
        except Exception as error:  # whatever the engine dies of, it is not ready
            return f"the engine does not decode ({type(error).__name__})"
        return None


async def livez(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    """The engine decodes: 200, or 503 with the reason."""
    readiness: Readiness = request.app.state.spallm_readiness
    problem = await readiness.problem()
    if problem is None:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not ready", "reason": problem}, 503)
