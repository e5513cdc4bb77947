"""Names of tenants and adapters, and what a request's ``model`` field says with them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spallm_serve.adapters_store.failures import StoreError

NAME_LENGTH = 64
# The first is no dot or dash: a name is never ".." and never looks like an option.
_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{NAME_LENGTH - 1}}}")
# A version may be named by the start of its digest; fewer digits would soon be ambiguous.
_SHORTEST_PREFIX = 4
_DIGEST_START = re.compile(rf"[0-9a-f]{{{_SHORTEST_PREFIX},64}}")
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """A parsed ``model`` field: ``[owner/]name[@start of a digest]``.

    Attributes:
        owner: a tenant, or None for the one who asks.
        name: the adapter's.
        digest_start: of the wanted version, or None for the released one.
    """

    owner: str | None
    name: str
    digest_start: str | None


def check_name(name: str, what: str) -> str:
    """The name, if it is one.

    Args:
        name: to be checked.
        what: "tenant" or "adapter", for the message.

    Raises:
        StoreError: it is none.
    """
    if not _NAME.fullmatch(name):
        shown = repr(name if len(name) <= NAME_LENGTH else name[:NAME_LENGTH] + "...")
        raise StoreError(
            f"{shown} is no {what} name: expected 1 to {NAME_LENGTH} of a-z, 0-9, '.', '_' and "
            "'-', beginning with a letter or digit"
        )
    return name


def check_digest(digest: str) -> str:
    """The digest, if it is one: 64 lowercase hexadecimal digits.

    Raises:
        StoreError: it is none.
    """
    if not DIGEST.fullmatch(digest):
        raise StoreError(f"{digest[:80]!r} is no digest: expected 64 of 0-9 and a-f")
    return digest


def parse_reference(field: str) -> Reference | None:
    """What a ``model`` field refers to; None where it is no adapter's name at all."""
    path, at, digest_start = field.partition("@")
    owner, slash, name = path.rpartition("/")
    if not _NAME.fullmatch(name) or (slash and not _NAME.fullmatch(owner)):
        return None
    if at and not _DIGEST_START.fullmatch(digest_start):
        return None
    return Reference(owner if slash else None, name, digest_start if at else None)


def engine_name(owner: str, name: str, digest: str) -> str:
    """The name an engine knows a version by: two versions never share one."""
    return f"{owner}/{name}@{digest}"
