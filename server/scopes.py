"""Who may call which route: what is not declared here is not served."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spallm_serve.adapters_store.records import Scope


@dataclass(frozen=True)
class Route:
    """A declared route.

    Attributes:
        methods: HTTP methods.
        pattern: of the whole path.
        scope: what the key has to be good for; None needs no key.
        names_model: whether its JSON body names a model, so that it has to be resolved and given
            the tenant's salt before the engine sees it.
        generates: whether the engine reads a prompt for it, which is counted.
    """

    methods: frozenset[str]
    pattern: re.Pattern[str]
    scope: Scope | None
    names_model: bool = False
    generates: bool = False

    def matches(self, method: str, path: str) -> bool:
        """Whether a request is one of this route's; HEAD counts as GET."""
        asked = "GET" if method == "HEAD" else method
        return asked in self.methods and self.pattern.fullmatch(path) is not None


def _route(methods: str, path: str, scope: Scope | None, **more: bool) -> Route:
    pattern = re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(path)))
    return Route(frozenset(methods.split()), pattern, scope, **more)


def _model(path: str, generates: bool = True) -> Route:
    return _route("POST", path, Scope.INFERENCE, names_model=True, generates=generates)


# Paths in the engine's server that are missing here (loading adapters by path, changing weights,
# profiling, pausing, stored responses, which any key could read) answer as if they did not exist.
ROUTES = (
    _route("GET", "/livez", None),
    _route("GET", "/readyz", None),
    _model("/v1/chat/completions"),
    _model("/v1/completions"),
    _model("/v1/responses"),
    _model("/v1/messages"),
    _model("/v1/messages/count_tokens", generates=False),
    _model("/tokenize", generates=False),
    _model("/detokenize", generates=False),
    _route("GET", "/v1/models", Scope.INFERENCE),
    _route("GET", "/v1/models/{model}", Scope.INFERENCE),
    _route("GET", "/version", Scope.INFERENCE),
    _route("GET", "/v1/usage", Scope.INFERENCE),
    _route("GET", "/v1/adapters", Scope.ADAPTERS),
    _route("POST", "/v1/adapters:validate", Scope.ADAPTERS),
    _route("GET PUT POST DELETE", "/v1/adapters/{name}", Scope.ADAPTERS),
    _route("GET", "/metrics", Scope.ADMIN),
    _route("GET", "/health", Scope.ADMIN),
    _route("GET POST", "/v1/residency", Scope.ADMIN),
)

# Asked every few seconds by what watches the server.
PROBES = tuple(route for route in ROUTES if route.scope is None)


def declared(method: str, path: str) -> Route | None:
    """The route of a request, or None if it is not served."""
    return next((route for route in ROUTES if route.matches(method, path)), None)
