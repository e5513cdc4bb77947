"""Local folders of adapter versions, for engines to load: complete and read-only, or absent."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from spallm_serve.adapter_files import CONFIG_FILE, TENSOR_FILE
from spallm_serve.adapters_store.blobs import BlobStore, sync
from spallm_serve.adapters_store.failures import UnavailableError
from spallm_serve.adapters_store.names import DIGEST, check_digest

_PARTIAL = ".partial-"


class Folders:
    """Adapter folders under one directory, each named by its digest; processes may share it.

    Args:
        directory: made where it is not there.
        blobs: where the bytes come from.

    Raises:
        UnavailableError: the directory cannot be made.
    """

    def __init__(self, directory: Path, blobs: BlobStore) -> None:
        self.directory, self._blobs = directory.absolute(), blobs
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnavailableError(f"{directory}: cannot hold adapters ({error})") from error

    def folder(self, digest: str, config_blob: str, tensors_blob: str) -> Path:
        """The folder of a version, fetched if it is not there yet.

        Raises:
            UnavailableError: a blob is missing, damaged or cannot be read.
        """
        final = self.directory / check_digest(digest)
        if final.is_dir():
            return final
        partial = self.directory / f"{_PARTIAL}{secrets.token_hex(8)}"
        try:
            partial.mkdir()
            for blob, name in ((config_blob, CONFIG_FILE), (tensors_blob, TENSOR_FILE)):
                self._blobs.fetch(blob, partial / name)
                (partial / name).chmod(0o444)
                sync(partial / name)
            partial.chmod(0o555)
            sync(partial)
            # Where another process was faster this fails, for its folder is not empty.
            partial.rename(final)
            sync(self.directory)
        except OSError as error:
            if not final.is_dir():
                raise UnavailableError(f"{final}: cannot be written ({error})") from error
        finally:
            _remove(partial)
        return final

    def sweep(self, keep: Collection[str], grace: float) -> int:
        """Remove folders of versions that are gone, and what killed processes left.

        Args:
            keep: digests of the versions that there are.
            grace: seconds for which what is new is left alone.

        Returns:
            How many were removed.
        """
        removed = 0
        for path in self.directory.iterdir():
            ours = path.name.startswith(_PARTIAL) or DIGEST.fullmatch(path.name)
            try:
                old = time.time() - path.stat().st_mtime > grace
            except FileNotFoundError:
                continue  # another process has just renamed or removed it
            if ours and path.name not in keep and old:
                _remove(path)
                removed += 1
        return removed


def _remove(path: Path) -> None:
    """Remove a folder; under its own name it is never there in part."""
    if not path.is_dir():
        return
    doomed = path.with_name(f"{_PARTIAL}{secrets.token_hex(8)}")
    try:
        path.rename(doomed)
    except OSError:  # another process removes it
        return
    doomed.chmod(0o755)
    shutil.rmtree(doomed, ignore_errors=True)
