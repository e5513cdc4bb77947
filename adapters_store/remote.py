"""A server's adapters from the terminal of a tenant: push, list, roll back, delete."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.table import Table

from spallm_serve.adapter_files import CONFIG_FILE, TENSOR_FILE, read_adapter
from spallm_serve.errors import UserError

_SECONDS = 600.0


class RemoteAdapters:
    """A tenant's adapters on a server.

    Args:
        server: its address, ``https://...``.
        key: with the scope ``adapters``.
        transport: another way to reach it, for tests.
    """

    def __init__(self, server: str, key: str, transport: httpx.BaseTransport | None = None) -> None:
        self._server = server
        self._client = httpx.Client(
            base_url=server,
            headers={"Authorization": f"Bearer {key}"},
            timeout=_SECONDS,
            transport=transport,
        )
        self._console = Console(highlight=False)

    def push(self, directory: Path, name: str, *, dry_run: bool) -> None:
        """Upload an adapter directory and release it.

        Args:
            directory: is read and checked first, as far as that is possible without the base.
            name: ``support`` or ``acme/support``.
            dry_run: only ask whether the server would take it.

        Raises:
            UserError: it is no adapter, or the server refuses it.
        """
        read_adapter(directory)
        with ExitStack() as opened:
            files = {
                part: opened.enter_context((directory / file).open("rb"))
                for part, file in (("config", CONFIG_FILE), ("tensors", TENSOR_FILE))
            }
            if dry_run:
                found = self._ask("POST", "/v1/adapters:validate", files=files)
                self._console.print(f"would be taken: {found['kind']}, {found['digest'][:12]}")
                return
            found = self._ask("PUT", _path(name), files=files)
        version = found["version"]
        done = "released" if found["created"] else "was there already, and is released"
        self._console.print(
            f"{version['owner']}/{version['name']}@{version['digest'][:12]} {done}: "
            f"{version['nbytes'] / 1e6:.2f} MB", soft_wrap=True,
        )  # fmt: skip

    def show(self, *, as_json: bool) -> None:
        """Print all adapters that the key's tenant may see.

        Raises:
            UserError: the server refuses.
        """
        found = self._ask("GET", "/v1/adapters")["data"]
        if as_json:
            print(json.dumps(found, indent=2))
            return
        table = Table("adapter", "released", "kind", "MB", "versions", "shared with")
        for adapter in found:
            released = adapter["released"] or {}
            shared = "everybody" if adapter["public"] else ", ".join(adapter["shared_with"])
            table.add_row(
                f"{adapter['owner']}/{adapter['name']}",
                released.get("digest", "")[:12],
                released.get("kind", ""),
                f"{released.get('nbytes', 0) / 1e6:.2f}",
                str(len(adapter["versions"])),
                shared,
            )
        self._console.print(table)

    def rollback(self, name: str) -> None:
        """Go back to the release before the current one.

        Raises:
            UserError: there is none, or the server refuses.
        """
        found = self._ask("POST", _path(name), json={"action": "rollback"})
        self._console.print(f"{name} is {found['digest'][:12]} again, revision {found['revision']}")

    def delete(self, name: str, version: str | None) -> None:
        """Delete an adapter, or one version of it that is not released.

        Raises:
            UserError: the server refuses.
        """
        asked = {} if version is None else {"version": version}
        for gone in self._ask("DELETE", _path(name), params=asked)["deleted"]:
            self._console.print(f"deleted: {gone}", soft_wrap=True)

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, **more)
        except httpx.HTTPError as error:
            raise UserError(f"{self._server}: cannot be reached ({error})") from error
        try:
            body = response.json()
        except ValueError:
            body = {}
        if response.is_success and isinstance(body, dict):
            return body
        said = body.get("error", {}).get("message") if isinstance(body, dict) else None
        raise UserError(f"{self._server}: {said or 'no answer of an adapter server'} "
                        f"({response.status_code})")  # fmt: skip


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name)}"
