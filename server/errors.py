"""Refusals in OpenAI's error format."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """A request that is refused, and what the client is told.

    Args:
        status: HTTP status.
        message: what was given, what was expected, what to do.
        code: OpenAI's machine-readable reason, e.g. ``model_not_found``.
        param: the field of the request it is about.
        headers: for the response, e.g. ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.headers = param, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """What the response says."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole of it."""
        return JSONResponse(self.body, self.status, headers=self.headers)


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def unauthorized() -> ApiError:
    """No key, or one that is not valid: which of the two is not said."""
    return ApiError(
        401,
        "a valid API key is needed: send the header 'Authorization: Bearer KEY'",
        "invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def forbidden(scope: str) -> ApiError:
    """A valid key without the scope of the route."""
    return ApiError(403, f"this key lacks the scope {scope!r}", "insufficient_scope")


def not_found(path: str) -> ApiError:
    """No such route, or one that is not served."""
    return ApiError(404, f"{path}: no such route", "not_found")


def model_not_found(model: str) -> ApiError:
    """A model that does not exist, or that the tenant may not use: which of the two is not said."""
    shown = model if len(model) <= 200 else model[:200] + "..."
    return ApiError(
        404,
        f"the model {shown!r} does not exist or you do not have access to it; "
        "GET /v1/models lists what you can use",
        "model_not_found",
        param="model",
    )


def too_large(limit: int, what: str = "the request") -> ApiError:
    """A body over its cap."""
    return ApiError(413, f"{what} is larger than {limit} bytes", "request_too_large")
