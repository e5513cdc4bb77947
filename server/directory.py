"""What the server has to know of its tenants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from spallm_serve.server.limits import Quota
from spallm_serve.server.metering import Usage


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        tenant: the name of the tenant.
        key: the name of the key, for logs; never its secret.
        scopes: what the key may do, see :class:`~spallm_serve.server.scopes.Access`.
    """

    tenant: str
    key: str
    scopes: frozenset[str]


@dataclass(frozen=True)
class Target:
    """What a request's ``model`` stands for.

    Attributes:
        engine_name: what the engine knows it by: ``tenant/adapter@digest``, or the base's name.
        adapter: ``tenant/adapter``, or None for the base.
    """

    engine_name: str
    adapter: str | None


class Directory(Protocol):
    """Tenants, keys and adapters, as the gate asks for them; all of it may block."""

    def caller(self, bearer: str) -> Caller | None:
        """Whose key this is; None if it is nobody's, revoked or expired."""

    def target(self, tenant: str, model: str) -> Target | None:
        """What a tenant means by a model; None if there is none that it may use."""

    def quota(self, tenant: str) -> Quota:
        """What the tenant may take a minute."""

    def record(self, caller: Caller, target: Target, usage: Usage) -> None:
        """Remember what a request took."""
