"""The command ``spallm-serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from spallm_serve.console import quiet_libraries, user_errors

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_EPILOG = """
[b]Examples[/b]

spallm-serve ./base-spallm-4bit

spallm-serve ./base-spallm-4bit --slots 16 --store /srv/spallm -- --max-model-len 4096

spallm-serve --config serve.yaml

[b]Everything after --[/b] goes to vLLM as it is.

[b]Every setting[/b] can be in the file of --config or in the environment, as SPALLM_SLOTS; flags
win over the environment, the environment over the file.
"""
_Option = typer.Option
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": False}


@app.command(epilog=_EPILOG, context_settings=_PASS_ON)
def main(
    context: typer.Context,
    base: Annotated[Optional[str], typer.Argument(help="What spallm-compress made.")] = None,
    host: Annotated[Optional[str], _Option(help="Address to listen on.")] = None,
    port: Annotated[Optional[int], _Option(help="Port to listen on.")] = None,
    name: Annotated[Optional[str], _Option(help="What requests call the base.")] = None,
    store: Annotated[
        Optional[str],
        _Option(help="Folder of the adapter store, or s3://, gs://, az://BUCKET/PREFIX."),
    ] = None,
    database: Annotated[
        Optional[str], _Option(help="Catalogue: postgresql://...; SQLite by default.")
    ] = None,
    slots: Annotated[
        Optional[int], _Option(help="Adapters that a step can mix, beside the base.")
    ] = None,
    host_bytes: Annotated[
        Optional[int], _Option(help="Memory for adapters that are in no slot.")
    ] = None,
    insecure_no_auth: Annotated[
        Optional[bool], _Option("--insecure-no-auth", help="No keys; for a laptop.")
    ] = None,
    config: Annotated[Optional[Path], _Option(help="Settings as YAML.")] = None,
) -> None:
    """An OpenAI-compatible server whose every request may use its own tenant's adapter.

    Adapters are uploaded while it runs: PUT /v1/adapters/NAME. A first start prints an admin key.
    """
    with user_errors():
        quiet_libraries()
        from spallm_serve.server.launch import serve
        from spallm_serve.server.settings import load_settings

        flags = {
            "base": base,
            "host": host,
            "port": port,
            "name": name,
            "database": database,
            "store": store,
            "slots": slots,
            "host_bytes": host_bytes,
            "insecure_no_auth": insecure_no_auth,
        }
        serve(load_settings(flags, config), context.args)
