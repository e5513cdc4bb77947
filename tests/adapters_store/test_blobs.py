"""Blobs by content, in a folder and in S3 (a local imitation)."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from spallm_serve.adapters_store.blobs import BlobStore
from spallm_serve.adapters_store.failures import DamagedError, NotFoundError, StoreError
from tests.adapters_store.stored import ADMIN, Location, location, lut, opened, tenant

_AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
ABSENT = "0" * 64


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in (_AWS | {"AWS_ENDPOINT": s3_endpoint}).items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{os.urandom(4).hex()}"
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    client.create_bucket(Bucket=name)
    return f"s3://{name}/prefix"


@pytest.fixture(params=["folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "folder":
        return BlobStore(str(tmp_path / "blobs"))
    return BlobStore(request.getfixturevalue("bucket"))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("size", [0, 1, 12 << 20])  # the last in several parts
def test_what_is_put_is_found_and_fetched(size: int, blobs: BlobStore, tmp_path: Path) -> None:
    content = os.urandom(size)
    digest = hashlib.sha256(content).hexdigest()
    blob = blobs.put_file(written(tmp_path / "file", content))
    assert (blob.digest, blob.nbytes) == (digest, size)
    assert blobs.put_file(tmp_path / "file").digest == digest
    found = blobs.find(digest)
    assert found is not None and found.nbytes == size
    assert [each.digest for each in blobs.blobs()] == [digest]
    blobs.fetch(digest, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == content
    blobs.delete([digest, ABSENT])
    blobs.delete([])
    assert blobs.find(digest) is None and list(blobs.blobs()) == []
    assert (tmp_path / "fetched").read_bytes() == content


def test_what_is_frozen_is_linked_and_all_else_copied(tmp_path: Path) -> None:
    blobs = BlobStore(str(tmp_path / "blobs"))
    for frozen in (False, True):
        path = written(tmp_path / f"file-{frozen}", f"content {frozen}".encode())
        os.utime(path, (1000, 1000))
        digest = blobs.put_file(path, frozen=frozen).digest
        found = blobs.find(digest)
        assert found is not None and found.age < 1000
        stored = tmp_path / "blobs" / digest[:2] / digest
        assert stored.samefile(path) == frozen
        assert stored.stat().st_mode & 0o777 == 0o444
        path.unlink()
        assert stored.read_bytes() == f"content {frozen}".encode()


def test_what_is_frozen_is_copied_where_it_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    blobs = BlobStore(str(tmp_path / "blobs"))
    blob = blobs.put_file(written(tmp_path / "file", b"content"), frozen=True)
    blobs.fetch(blob.digest, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"content"


def test_what_is_not_there(blobs: BlobStore, tmp_path: Path) -> None:
    assert blobs.find(ABSENT) is None
    with pytest.raises(NotFoundError):
        blobs.fetch(ABSENT, tmp_path / "fetched")
    with pytest.raises(StoreError):
        blobs.put_file(tmp_path / "nothing")
    for name in ("../../etc/passwd", "x", ABSENT.upper().replace("0", "A"), ABSENT + "/.."):
        with pytest.raises(StoreError, match="no digest"):
            blobs.find(name)


def test_damage_in_a_folder_is_seen_and_a_cut_blob_mended(tmp_path: Path) -> None:
    blobs = BlobStore(str(tmp_path / "blobs"))
    digest = blobs.put_file(written(tmp_path / "file", b"content")).digest
    path = tmp_path / "blobs" / digest[:2] / digest
    path.chmod(0o644)
    path.write_bytes(b"Content")
    with pytest.raises(DamagedError):
        blobs.fetch(digest, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    path.write_bytes(b"con")
    blobs.put_file(tmp_path / "file")
    blobs.fetch(digest, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"content"


def test_damage_in_s3_is_seen(bucket: str, s3_endpoint: str, tmp_path: Path) -> None:
    blobs = BlobStore(bucket)
    digest = blobs.put_file(written(tmp_path / "file", b"content")).digest
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    key = f"prefix/{digest[:2]}/{digest}"
    client.put_object(Bucket=bucket.split("/")[2], Key=key, Body=b"Content")
    with pytest.raises(DamagedError):
        blobs.fetch(digest, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_files_that_are_no_blobs_are_left_alone(tmp_path: Path) -> None:
    blobs = BlobStore(str(tmp_path / "blobs"))
    (tmp_path / "blobs" / "README").write_text("by hand")
    assert list(blobs.blobs()) == []


@pytest.mark.parametrize("where", ["nosuch://bucket", "/proc/nowhere"])
def test_no_place_for_blobs(where: str) -> None:
    with pytest.raises(StoreError, match="cannot hold blobs"):
        BlobStore(where)


def test_a_bucket_that_is_not_there(bucket: str, tmp_path: Path) -> None:
    blobs = BlobStore("s3://no-such-bucket/prefix")
    with pytest.raises(StoreError, match="cannot be stored"):
        blobs.put_file(written(tmp_path / "file", b"content"))


def test_a_store_on_s3(bucket: str, tmp_path: Path) -> None:
    where = location(tmp_path)
    with opened(Location(bucket, where.database, where.folders)) as store:
        acme = tenant(store, "acme")
        result = store.put(acme, "acme", "support", *lut().write(tmp_path / "upload"))
        folder = store.local_folder(result.version.digest)
        tensors = (folder / "adapter_model.safetensors").read_bytes()
        assert tensors == lut().tensors
        store.adapters.delete(acme, "acme", "support")
        assert store.collect(ADMIN, grace=0).blobs == 2
    assert list(BlobStore(bucket).blobs()) == []
