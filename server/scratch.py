"""A folder for what is on its way, which is gone with its process, however that ends."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = "lock"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder of this process's own; those of processes that were killed are removed.

    Args:
        parent: may be other servers' too; nothing else is kept in it.
    """
    parent.mkdir(parents=True, exist_ok=True)
    own = parent / secrets.token_hex(8)
    lock = FileLock(own / _LOCK)
    with FileLock(parent.with_name(f".{parent.name}.lock")):
        for folder in parent.iterdir():
            _remove_if_nobodys(folder)
        own.mkdir()
        lock.acquire()
    try:
        yield own
    finally:
        lock.release()
        shutil.rmtree(own, ignore_errors=True)


def _remove_if_nobodys(folder: Path) -> None:
    try:
        with FileLock(folder / _LOCK, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
    except (Timeout, NotADirectoryError):  # in use, or none of ours
        return
