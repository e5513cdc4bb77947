"""Who may do what to whose things."""

from __future__ import annotations

from spallm_serve.adapters_store.failures import ForbiddenError, NotFoundError
from spallm_serve.adapters_store.records import Principal, Scope

# Whoever runs commands on the machine of the store can read its files anyway. No tenant can have
# this name.
OPERATOR = Principal(tenant="(operator)", scopes=frozenset({Scope.ADMIN}), key_id="local")


def expect_admin(actor: Principal) -> None:
    """Refuse all but admins.

    Raises:
        ForbiddenError: another.
    """
    if not actor.may(Scope.ADMIN):
        raise ForbiddenError("this needs a key with the scope 'admin'")


def expect_owner(actor: Principal, owner: str, name: str) -> None:
    """Refuse changes to an adapter by others than its owner and admins.

    Raises:
        ForbiddenError: the key lacks the scope for any adapter.
        NotFoundError: it is another's; the answer is the same where there is none.
    """
    if not actor.may(Scope.ADAPTERS):
        raise ForbiddenError("this needs a key with the scope 'adapters'")
    if owner != actor.tenant and not actor.may(Scope.ADMIN):
        raise absent(owner, name)


def absent(owner: str, name: str, digest: str | None = None) -> NotFoundError:
    """What is said of an adapter that is not there, or not for the one who asks."""
    version = "" if digest is None else f"@{digest[:12]}"
    return NotFoundError(f"there is no adapter {owner}/{name}{version}")
