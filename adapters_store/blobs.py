"""Bytes by content: a blob's name is its sha256, and it is there completely or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from spallm_serve.adapters_store.failures import DamagedError, NotFoundError, UnavailableError
from spallm_serve.adapters_store.names import check_digest

_CHUNK = 1 << 20
_KEY = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Blob:
    """A blob that is there.

    Attributes:
        digest: sha256 of its bytes, its name.
        nbytes: how many.
        age: seconds since it was written.
    """

    digest: str
    nbytes: int
    age: float


class BlobStore:
    """Blobs in a folder, or in a bucket of S3, GCS or Azure.

    A bucket's own put is all or nothing. In a folder, bytes go to a temporary name, are synced and
    then renamed, so that neither a kill nor a power cut leaves half a blob under its name.

    Args:
        location: a folder's path, or a URL: ``s3://bucket/prefix``, ``gs://``, ``az://``. Buckets
            are configured by their providers' environment variables (``AWS_ACCESS_KEY_ID``, ...).

    Raises:
        UnavailableError: the folder cannot be made, or the URL is of no known kind.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.folder = None if "://" in location else Path(location).absolute()
        try:
            if self.folder is not None:
                (self.folder / _PARTIAL).mkdir(parents=True, exist_ok=True)
            self._store: ObjectStore = (
                from_url(location) if self.folder is None else LocalStore(self.folder)
            )
        except (OSError, ValueError, BaseError) as error:
            raise UnavailableError(f"{location}: cannot hold blobs ({error})") from error

    def put_file(self, path: Path, *, frozen: bool = False) -> Blob:
        """Store a file's bytes; where they are there already, nothing is written.

        Args:
            path: the file.
            frozen: whether nobody will change it any more. Then it is linked into a folder of the
                same file system, and not written a second time.

        Raises:
            UnavailableError: it cannot be read or stored.
        """
        try:
            digest, nbytes = file_digest(path), path.stat().st_size
            found = self.find(digest)
            # A blob of another size was cut by a failing disk; this is the moment to mend it.
            if found is None or found.nbytes != nbytes:
                self._write(digest, path, frozen)
                found = Blob(digest, nbytes, 0.0)
        except (OSError, BaseError) as error:
            raise UnavailableError(f"{self.location}: a blob cannot be stored ({error})") from error
        return found

    def find(self, digest: str) -> Blob | None:
        """The blob of a digest, if it is there.

        Raises:
            UnavailableError: the store cannot be asked.
        """
        try:
            meta = obstore.head(self._store, _key(digest))
        except FileNotFoundError:
            return None
        except BaseError as error:
            raise UnavailableError(f"{self.location}: cannot be read ({error})") from error
        return Blob(digest, meta["size"], time.time() - meta["last_modified"].timestamp())

    def fetch(self, digest: str, target: Path) -> None:
        """Bring a blob into a new local file, and check its bytes on the way.

        Out of a folder it is linked where the file system can, so that it takes no second room.

        Args:
            digest: of the blob.
            target: the file; in a directory that only the caller looks at.

        Raises:
            NotFoundError: no such blob.
            DamagedError: its bytes have another digest; the target is not there then.
            UnavailableError: it cannot be read or written.
        """
        try:
            self._bring(digest, target)
            found = file_digest(target)
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.location}: no blob {digest}") from error
        except (OSError, BaseError) as error:
            raise UnavailableError(
                f"{self.location}: blob {digest} cannot be read ({error})"
            ) from error
        if found != digest:
            target.unlink()
            raise DamagedError(
                f"{self.location}: blob {digest} is damaged: its bytes have the digest {found}"
            )

    def blobs(self) -> Iterator[Blob]:
        """All that are there, in no order."""
        now = time.time()
        for page in obstore.list(self._store):
            for meta in page:
                match = _KEY.fullmatch(meta["path"])
                if match:
                    age = now - meta["last_modified"].timestamp()
                    yield Blob(match[2], meta["size"], age)

    def delete(self, digests: Collection[str]) -> None:
        """Remove blobs; those that are not there are no error.

        Raises:
            UnavailableError: one cannot be removed.
        """
        try:
            if self.folder is not None:
                for digest in digests:
                    (self.folder / _key(digest)).unlink(missing_ok=True)
            elif digests:
                obstore.delete(self._store, [_key(digest) for digest in digests])
        except (OSError, BaseError) as error:
            raise UnavailableError(f"{self.location}: blobs cannot be removed ({error})") from error

    def sweep(self, grace: float) -> int:
        """Remove what writers that were killed left half-done, older than ``grace`` seconds.

        Returns:
            How many files. Buckets have none: an unfinished upload shows nowhere in them, and their
            lifecycle rules remove its parts.
        """
        if self.folder is None:
            return 0
        removed = 0
        for path in (self.folder / _PARTIAL).iterdir():
            try:
                if time.time() - path.stat().st_mtime > grace:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:
                continue  # its writer has just finished
        return removed

    def _write(self, digest: str, path: Path, frozen: bool) -> None:
        if self.folder is None:
            obstore.put(self._store, _key(digest), path)
            return
        partial = self.folder / _PARTIAL / secrets.token_hex(8)
        target = self.folder / _key(digest)
        try:
            if frozen and _link(path, partial):
                os.utime(partial)  # its age counts from now
            else:
                shutil.copyfile(path, partial)
            partial.chmod(0o444)
            sync(partial)
            sync_directory_of(target)
            partial.replace(target)
            sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)

    def _bring(self, digest: str, target: Path) -> None:
        if self.folder is not None:
            source = self.folder / _key(digest)
            if not _link(source, target):
                shutil.copyfile(source, target)
            return
        with target.open("xb") as file:
            for chunk in obstore.get(self._store, _key(digest)).stream(min_chunk_size=_CHUNK):
                file.write(chunk)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory_of(path: Path) -> None:
    """Make the directory of a file to come, durably."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        sync(path.parent.parent)


def _link(source: Path, target: Path) -> bool:
    """Whether a file is now under another name too: not on another file system, or one without."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    return True


def _key(digest: str) -> str:
    """Where a blob lies: in one of 256 folders, so that no folder grows without bounds."""
    check_digest(digest)
    return f"{digest[:2]}/{digest}"
