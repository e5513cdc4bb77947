"""Garbage collection: blobs that no version points at."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, select

from spallm_serve.adapters_store.blobs import Blob, BlobStore
from spallm_serve.adapters_store.catalog import BLOBS, Catalog, lock
from spallm_serve.adapters_store.schema import adapters

# Removed in one transaction: those who put adapters wait for it.
_AT_ONCE = 100


def collect_blobs(catalog: Catalog, blobs: BlobStore, grace: float) -> list[Blob]:
    """Remove blobs that no version points at.

    Safe beside uploads: a blob is removed while nobody can begin to point at it, and who points at
    a blob makes sure, in the same way, that it is there (:func:`pointing_at`).

    Args:
        catalog: says what is pointed at.
        blobs: where they are.
        grace: seconds for which a new blob is left alone; its version may be about to come.

    Returns:
        Those removed.
    """
    old = [blob for blob in blobs.blobs() if blob.age >= grace]
    removed: list[Blob] = []
    for start in range(0, len(old), _AT_ONCE):
        some = old[start : start + _AT_ONCE]
        with catalog.write() as connection:
            lock(connection, BLOBS)
            used = _used(connection, [blob.digest for blob in some])
            doomed = [blob for blob in some if blob.digest not in used]
            blobs.delete([blob.digest for blob in doomed])
        removed += doomed
    return removed


def pointing_at(connection: Connection, blobs: BlobStore, digests: Sequence[str]) -> bool:
    """Whether blobs are there, and will be until the transaction ends."""
    lock(connection, BLOBS, shared=True)
    return all(blobs.find(digest) is not None for digest in digests)


def _used(connection: Connection, digests: list[str]) -> set[str]:
    columns = adapters.c.config_blob, adapters.c.tensors_blob
    return {
        digest
        for column in columns
        for digest in connection.execute(select(column).where(column.in_(digests))).scalars()
    }
