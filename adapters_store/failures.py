"""What the adapter store refuses, by reason; each says what a tenant can do about it.

All are :class:`~spallm_serve.errors.UserError`, so that commands print them as one line. A server
tells them apart by class.
"""

from __future__ import annotations

from spallm_serve.errors import UserError


class StoreError(UserError):
    """Any refusal of the store; if of no class below, then of what was given, as a bad name."""


class NotFoundError(StoreError):
    """There is no such thing, or the one who asks may not know that there is."""


class ForbiddenError(StoreError):
    """The key is good, but not for this."""


class ConflictError(StoreError):
    """It is no longer as the caller believed, or it is in use."""


class QuotaError(StoreError):
    """The tenant's quota does not allow it."""


class RejectedError(StoreError):
    """An upload that is no adapter of the base."""


class UnavailableError(StoreError):
    """The store itself fails: the database, the disk, the bucket. Later it may work."""


class DamagedError(UnavailableError):
    """What is stored is not what was put there."""
