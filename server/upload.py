"""An adapter on its way in: two parts of a form, streamed to disk under a cap and a deadline."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from spallm_serve.server.errors import ApiError, too_large
from spallm_serve.server.settings import ServerSettings

CONFIG_PART, TENSOR_PART = "config", "tensors"
_FORM_OVERHEAD = 16_384


@dataclass(frozen=True)
class Upload:
    """The two files of an adapter, in a folder that goes away."""

    config: Path
    tensors: Path


@asynccontextmanager
async def received(
    request: Request, folder: Path, settings: ServerSettings
) -> AsyncIterator[Upload]:
    """Take an upload in; nothing of it stays.

    Args:
        request: ``multipart/form-data`` with the files ``config`` and ``tensors``.
        folder: for it, meanwhile.
        settings: has its cap and its deadline.

    Raises:
        ApiError: not such a form (400), too large (413) or too slow (408).
    """
    limit = settings.upload_bytes + _FORM_OVERHEAD
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large(settings.upload_bytes, "the upload")
    with tempfile.TemporaryDirectory(dir=folder) as own:
        try:
            async with asyncio.timeout(settings.upload_seconds):
                upload = await _parsed(request, Path(own), limit)
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the upload was not complete after {settings.upload_seconds:g} s",
                "request_timeout",
            ) from error
        yield upload


async def _parsed(request: Request, folder: Path, limit: int) -> Upload:
    parser = MultiPartParser(request.headers, _capped(request, limit), max_files=2, max_fields=0)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, AssertionError, ValueError) as error:
        raise ApiError(400, f"not a form of two files ({error})", "invalid_upload") from error
    try:
        paths = {}
        for name in (CONFIG_PART, TENSOR_PART):
            part = form.get(name)
            if not isinstance(part, UploadFile):
                raise ApiError(
                    400,
                    f"the file {name!r} is missing: expected multipart/form-data with the files "
                    f"{CONFIG_PART!r} (adapter_config.json) and {TENSOR_PART!r} "
                    "(adapter_model.safetensors)",
                    "invalid_upload",
                    param=name,
                )
            paths[name] = folder / name
            await asyncio.to_thread(_written, part, paths[name])
    finally:
        await form.close()
    return Upload(paths[CONFIG_PART], paths[TENSOR_PART])


def _written(part: UploadFile, path: Path) -> None:
    part.file.seek(0)
    with path.open("wb") as file:
        shutil.copyfileobj(part.file, file)


async def _capped(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large(limit, "the upload")
        yield chunk
