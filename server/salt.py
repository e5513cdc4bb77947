"""A tenant's own key into the prefix cache."""

from __future__ import annotations

import base64
import hashlib
import hmac

SECRET_BYTES = 32


def cache_salt(secret: bytes, tenant: str) -> str:
    """The salt of a tenant's requests, so that no two tenants share a cached token.

    It is an HMAC under the server's secret: nobody who does not know it can make another tenant's
    salt, and replicas with one secret share a tenant's cache. Adapters need no part in it: the
    engine's cache keys hold the adapter's name, which ends in its digest.

    Args:
        secret: at least 32 bytes.
        tenant: its name.

    Returns:
        43 letters, digits, ``-`` and ``_``.

    Raises:
        ValueError: the secret is too short.
    """
    if len(secret) < SECRET_BYTES:
        raise ValueError(f"the cache secret has {len(secret)} bytes, expected {SECRET_BYTES}")
    mac = hmac.digest(secret, b"spallm cache salt\0" + tenant.encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(mac).decode().rstrip("=")
