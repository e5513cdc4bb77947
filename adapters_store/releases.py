"""Moving an adapter's name from version to version: release, compare-and-set, rollback."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from spallm_serve.adapters_store.authority import absent
from spallm_serve.adapters_store.failures import ConflictError
from spallm_serve.adapters_store.journal import note
from spallm_serve.adapters_store.records import Principal, Release
from spallm_serve.adapters_store.schema import adapters, aliases, now, releases


def released(connection: Connection, owner: str, name: str) -> str | None:
    """The digest that a name stands for, or None."""
    query = select(aliases.c.digest).where(aliases.c.tenant == owner, aliases.c.name == name)
    found: str | None = connection.execute(query).scalar_one_or_none()
    return found


def expect_released(
    connection: Connection, owner: str, name: str, expected: str | None
) -> str | None:
    """The released digest, if it is the one that the caller believes it is.

    Raises:
        ConflictError: it is another.
    """
    found = released(connection, owner, name)
    if found != expected:
        raise ConflictError(
            f"{owner}/{name} stands for {_said(found)}, not for {_said(expected)} as you expected; "
            "look again, then decide"
        )
    return found


def release(
    connection: Connection,
    actor: Principal,
    owner: str,
    name: str,
    digest: str,
    restores: int | None = None,
) -> Release:
    """Let a name stand for a version that is there; nothing happens where it does already.

    Args:
        connection: holds the owner's lock.
        actor: who does it, for the record.
        owner, name, digest: the version.
        restores: the revision that a rollback goes back to.

    Raises:
        NotFoundError: no such version.
    """
    version = select(adapters.c.digest).where(
        adapters.c.tenant == owner, adapters.c.name == name, adapters.c.digest == digest
    )
    if connection.execute(version).one_or_none() is None:
        raise absent(owner, name, digest)
    current = released(connection, owner, name)
    if current == digest:
        return Release(**history(connection, owner, name)[0])
    # Of earlier times too: a name that was deleted and comes again goes on counting.
    last = select(func.coalesce(func.max(releases.c.revision), 0)).where(
        releases.c.tenant == owner, releases.c.name == name
    )
    move = {
        "revision": connection.execute(last).scalar_one() + 1,
        "digest": digest,
        "restores": restores,
        "key_id": actor.key_id,
        "moved_at": now(),
    }
    if current is None:
        row = {"tenant": owner, "name": name, "public": False}
        connection.execute(
            insert(aliases).values(row | {"digest": digest, "revision": move["revision"]})
        )
    else:
        connection.execute(
            update(aliases)
            .where(aliases.c.tenant == owner, aliases.c.name == name)
            .values(digest=digest, revision=move["revision"])
        )
    connection.execute(insert(releases).values(move | {"tenant": owner, "name": name}))
    action = "adapter.release" if restores is None else "adapter.rollback"
    note(connection, actor, owner, action, f"{name}@{digest}", previous=current)
    return Release(**move)


def history(connection: Connection, owner: str, name: str) -> list[dict[str, Any]]:
    """All moves of a name, the last first: the fields of :class:`Release`."""
    columns = [releases.c[field] for field in Release.model_fields]
    query = (
        select(*columns)
        .where(releases.c.tenant == owner, releases.c.name == name)
        .order_by(releases.c.revision.desc())
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def rollback_target(connection: Connection, owner: str, name: str) -> tuple[str, int]:
    """What a rollback goes to: the release before the current one whose version is still there.

    A rollback does not count as a release: one after another goes ever further back.

    Returns:
        Its digest and revision.

    Raises:
        NotFoundError: nothing is released.
        ConflictError: there is none to go back to.
    """
    current = released(connection, owner, name)
    if current is None:
        raise absent(owner, name)
    moves = history(connection, owner, name)
    start = moves[0]["restores"] or moves[0]["revision"]
    query = select(adapters.c.digest).where(adapters.c.tenant == owner, adapters.c.name == name)
    there = set(connection.execute(query).scalars())
    for move in moves:
        earlier = move["restores"] is None and move["revision"] < start
        if earlier and move["digest"] != current and move["digest"] in there:
            return move["digest"], move["revision"]
    raise ConflictError(f"{owner}/{name} has no earlier release whose version is still stored")


def _said(digest: str | None) -> str:
    return "nothing" if digest is None else digest[:12]
