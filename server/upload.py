"""An adapter on its way in: two parts of a form, streamed to disk under a cap and a deadline."""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import (
    MultipartParser,
    parse_options_header,
)
from starlette.requests import ClientDisconnect, Request

from spallm_serve.server.errors import ApiError, too_large
from spallm_serve.server.settings import ServerSettings

if TYPE_CHECKING:  # it is not there otherwise
    from python_multipart.multipart import MultipartCallbacks

_Run = Callable[[Callable[[], None]], Awaitable[None]]

CONFIG_PART, TENSOR_PART = "config", "tensors"
_FORM_OVERHEAD = 16_384
# Bytes that are gathered before a thread writes them: each turn of a thread that has stepped back
# may let the event loop, and with it everybody's tokens, wait.
_WRITTEN_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Upload:
    """The two files of an adapter, in a folder that goes away."""

    config: Path
    tensors: Path


@asynccontextmanager
async def received(
    request: Request,
    folder: Path,
    settings: ServerSettings,
    run: _Run,
) -> AsyncIterator[Upload]:
    """Take an upload in; nothing of it stays.

    Args:
        request: ``multipart/form-data`` with the files ``config`` and ``tensors``.
        folder: for it, meanwhile.
        settings: has its cap and its deadline.
        run: does what blocks in a thread.

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
                upload = await _parsed(request, Path(own), limit, run)
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the upload was not complete after {settings.upload_seconds:g} s",
                "request_timeout",
            ) from error
        yield upload


async def _parsed(
    request: Request,
    folder: Path,
    limit: int,
    run: _Run,
) -> Upload:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise _no_form("expected Content-Type: multipart/form-data with a boundary")
    size = 0
    with ExitStack() as opened:
        form = _Form(folder, opened)
        try:
            parser = MultipartParser(boundary, form.callbacks())
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large(limit, "the upload")
                parser.write(chunk)
                if form.waiting_bytes >= _WRITTEN_AT_ONCE:
                    await run(form.write)
            parser.finalize()
            await run(form.write)
        except (FormParserError, ValueError) as error:
            raise _no_form(str(error)) from error
        except ClientDisconnect as error:
            raise ApiError(400, "the client went away", "client_closed_request") from error
    for name in (CONFIG_PART, TENSOR_PART):
        if name not in form.complete:
            raise _no_form(f"the file {name!r} is missing", name)
    return Upload(folder / CONFIG_PART, folder / TENSOR_PART)


class _Form:
    """The parts of a form, each into a file of its name.

    They go there directly, and to no other disk: what they may fill is the server's to choose.

    Args:
        folder: where to.
        opened: closes the files.

    Attributes:
        complete: the parts that have come.
        waiting_bytes: that have come and are not on the disk.
    """

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self._folder, self._opened = folder, opened
        self._field, self._value, self._disposition = b"", b"", b""
        self._file: BinaryIO
        self._name = ""
        self._waiting: defaultdict[BinaryIO, bytearray] = defaultdict(bytearray)
        self.complete: set[str] = set()
        self.waiting_bytes = 0

    def callbacks(self) -> MultipartCallbacks:
        """For the parser; they only remember, since they are called in the server's event loop."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }

    def write(self) -> None:
        """Bring what has come to the disk; blocks."""
        for file, data in self._waiting.items():
            file.write(data)
        self._waiting.clear()
        self.waiting_bytes = 0

    def _begin(self) -> None:
        self._field, self._value, self._disposition = b"", b"", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("latin-1")
        if self._name not in (CONFIG_PART, TENSOR_PART) or b"filename" not in options:
            raise _no_form(f"a part {self._name[:40]!r} that is none of its files")
        path = self._folder / self._name
        if path.exists():
            raise _no_form(f"the file {self._name!r} is there twice", self._name)
        self._file = self._opened.enter_context(path.open("xb"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._waiting[self._file] += data[start:end]
        self.waiting_bytes += end - start

    def _end(self) -> None:
        self.complete.add(self._name)


def _no_form(problem: str, param: str | None = None) -> ApiError:
    return ApiError(
        400,
        f"{problem}; expected multipart/form-data with the files {CONFIG_PART!r} "
        f"(adapter_config.json) and {TENSOR_PART!r} (adapter_model.safetensors)",
        "invalid_upload",
        param=param,
    )
