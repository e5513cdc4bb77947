"""Versions of adapters: rows that point at blobs."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, insert

from spallm_serve.adapters_store.blobs import Blob
from spallm_serve.adapters_store.journal import note
from spallm_serve.adapters_store.names import Reference
from spallm_serve.adapters_store.records import Principal, PutResult
from spallm_serve.adapters_store.releases import release, released
from spallm_serve.adapters_store.schema import adapters, now
from spallm_serve.adapters_store.validate import Checked
from spallm_serve.adapters_store.visibility import find_version


@dataclass(frozen=True)
class Putting:
    """A put that has passed its checks.

    Attributes:
        actor: who puts.
        owner, name: what it will be asked for by.
        checked: what it is.
        released: whether the name shall stand for it.
    """

    actor: Principal
    owner: str
    name: str
    checked: Checked
    released: bool


def add_version(connection: Connection, put: Putting, config: Blob, tensors: Blob) -> None:
    """Add a version's row.

    Args:
        connection: holds the owner's lock, and keeps the blobs
            (:func:`~spallm_serve.adapters_store.collection.pointing_at`).
        put: the version; it is not there yet.
        config, tensors: its bytes.
    """
    nbytes = config.nbytes + tensors.nbytes
    row = {
        "tenant": put.owner,
        "name": put.name,
        "digest": put.checked.digest,
        "kind": put.checked.kind,
        "base_digest": put.checked.base_digest,
        "config_blob": config.digest,
        "tensors_blob": tensors.digest,
        "nbytes": nbytes,
        "created_at": now(),
    }
    connection.execute(insert(adapters).values(row))
    subject = f"{put.name}@{put.checked.digest}"
    note(connection, put.actor, put.owner, "adapter.put", subject, nbytes=nbytes)


def finish(connection: Connection, put: Putting, *, created: bool) -> PutResult | None:
    """Release a version that is there, if that was wanted.

    Args:
        connection: holds the owner's lock.
        put: the version.
        created: whether this put has added it.

    Returns:
        None where it is not there.
    """
    digest = put.checked.digest
    reference = Reference(put.owner, put.name, digest)
    version = find_version(connection, put.owner, reference, None)
    if version is None:
        return None
    if put.released:
        release(connection, put.actor, put.owner, put.name, digest)
    is_released = released(connection, put.owner, put.name) == digest
    return PutResult(version=version, created=created, released=is_released)
