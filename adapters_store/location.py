"""Where a store is: its blobs, its catalogue, its local folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

STORE_VARIABLE, DATABASE_VARIABLE = "SPALLM_STORE", "SPALLM_DATABASE"


@dataclass(frozen=True)
class Location:
    """The three places.

    Attributes:
        blobs: a folder, or a bucket's URL.
        database: SQLAlchemy's URL.
        folders: a local directory for the adapters that engines load.
    """

    blobs: str
    database: str
    folders: Path


def locate(store: str | None = None, database: str | None = None) -> Location:
    """Where a store is, by what was said and otherwise by what is usual.

    Args:
        store: a folder, which then has all three unless a database is given; or a bucket's URL,
            with the rest in the usual folder.
        database: SQLAlchemy's URL.
    """
    remote = store is not None and "://" in store
    folder = _usual_folder() if store is None or remote else Path(store).absolute()
    return Location(
        blobs=store if store is not None and remote else str(folder / "blobs"),
        database=database or f"sqlite:///{folder / 'catalogue.db'}",
        folders=folder / "adapters",
    )


def _usual_folder() -> Path:
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "spallm-serve"
