"""Who may call which route: what is not declared here is not served."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Access(Enum):
    """What a route asks of its caller.

    ``PUBLIC`` needs no key. ``INFER`` is for requests to a model, ``ADAPTERS`` for a tenant's own
    adapters and ``ADMIN`` for the operator; the values are the scopes that a key can have.
    """

    PUBLIC = "public"
    INFER = "infer"
    ADAPTERS = "adapters"
    ADMIN = "admin"


@dataclass(frozen=True)
class Route:
    """A declared route.

    Attributes:
        methods: HTTP methods.
        pattern: of the whole path.
        access: what it asks.
        names_model: whether its JSON body names a model, so that it has to be resolved and given
            the tenant's salt before the engine sees it.
    """

    methods: frozenset[str]
    pattern: re.Pattern[str]
    access: Access
    names_model: bool = False

    def matches(self, method: str, path: str) -> bool:
        """Whether a request is one of this route's; HEAD counts as GET."""
        asked = "GET" if method == "HEAD" else method
        return asked in self.methods and self.pattern.fullmatch(path) is not None


def _route(methods: str, path: str, access: Access, names_model: bool = False) -> Route:
    pattern = re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(path)))
    return Route(frozenset(methods.split()), pattern, access, names_model)


# Paths in the engine's server that are missing here (loading adapters by path, changing weights,
# profiling, pausing, stored responses, which any key could read) answer as if they did not exist.
ROUTES = (
    _route("GET", "/livez", Access.PUBLIC),
    _route("GET", "/readyz", Access.PUBLIC),
    _route("POST", "/v1/chat/completions", Access.INFER, names_model=True),
    _route("POST", "/v1/completions", Access.INFER, names_model=True),
    _route("POST", "/v1/responses", Access.INFER, names_model=True),
    _route("POST", "/v1/messages", Access.INFER, names_model=True),
    _route("POST", "/v1/messages/count_tokens", Access.INFER, names_model=True),
    _route("POST", "/tokenize", Access.INFER, names_model=True),
    _route("POST", "/detokenize", Access.INFER, names_model=True),
    _route("GET", "/v1/models", Access.INFER),
    _route("GET", "/v1/models/{model}", Access.INFER),
    _route("GET", "/version", Access.INFER),
    _route("GET", "/v1/usage", Access.INFER),
    _route("GET", "/v1/adapters", Access.ADAPTERS),
    _route("POST", "/v1/adapters:validate", Access.ADAPTERS),
    _route("GET PUT DELETE", "/v1/adapters/{name}", Access.ADAPTERS),
    _route("GET", "/metrics", Access.ADMIN),
    _route("GET", "/health", Access.ADMIN),
    _route("GET", "/v1/residency", Access.ADMIN),
)


def declared(method: str, path: str) -> Route | None:
    """The route of a request, or None if it is not served."""
    return next((route for route in ROUTES if route.matches(method, path)), None)
