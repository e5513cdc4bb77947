"""The command ``spallm-adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from spallm_serve.console import quiet_libraries, user_errors

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Look at adapters, verify and compare them, merge them into a base, make them from LoRAs.",
)

_Adapter = Annotated[
    Path, typer.Argument(help="Directory with adapter_config.json and adapter_model.safetensors.")
]
_Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")]
_Option = typer.Option


@app.command(epilog="[b]Example[/b]   spallm-adapter inspect ./support --json")
def inspect(
    adapter: _Adapter,
    as_json: Annotated[bool, _Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what an adapter is: kind, base, identity, size, and what it changes, module by module.

    The adapter digest is its identity: the same values have the same digest, under any name.
    """
    with user_errors():
        quiet_libraries()
        from spallm_serve.adapters_store.command import inspect_adapter

        inspect_adapter(adapter, as_json=as_json)


@app.command(epilog="[b]Example[/b]   spallm-adapter verify ./support --base ./base-spallm-2bit")
def verify(
    adapter: _Adapter,
    base: Annotated[
        Optional[str], _Option(help="What spallm-compress made, or a dense model.")
    ] = None,
) -> None:
    """Read all of an adapter: whole, finite, of one kind; and does it fit its base?

    With a base, names and shapes are compared with its layers, and the digest that the adapter
    names with that of the base's codes (of a dense base: of its weights), which are read for it.
    Prints one line; what is wrong is an error with exit code 2.
    """
    with user_errors():
        quiet_libraries()
        from spallm_serve.adapters_store.command import verify_adapter

        verify_adapter(adapter, base)


@app.command(
    epilog="[b]Example[/b]   spallm-adapter merge ./support --base ./base-spallm-2bit -o merged"
)
def merge(
    adapter: _Adapter,
    base: Annotated[str, _Option(help="The base that the adapter was made for.")],
    output: _Output,
) -> None:
    """Make a model that needs no adapter: the base with the adapter in its weights.

    [b]Tables[/b] take the place of the base's, and the model stays compressed, with the same codes
    and the same base digest. So other adapters of the base still load on it; but where such an
    adapter leaves a layer or a row alone, it now finds the merged tables and not the base's.

    [b]Blocks[/b] and [b]LoRAs[/b] are added to dense weights. A dense base keeps its dtype. A
    compressed base becomes a dense model in bfloat16, several times its size, and is no base for
    its adapters any more.
    """
    with user_errors():
        quiet_libraries()
        from spallm_serve.adapters_store.command import merge_adapter

        merge_adapter(adapter, base, output)


@app.command(epilog="[b]Example[/b]   spallm-adapter diff ./support ./support-v2")
def diff(
    a: Annotated[Path, typer.Argument(help="An adapter.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Compare two adapters: what one alone changes, and how far apart they are elsewhere.

    Tables are compared by row, blocks by their place in the weight, LoRAs by the change that A and
    B make together. The modules furthest apart come first.
    """
    with user_errors():
        quiet_libraries()
        from spallm_serve.adapters_store.command import diff_adapters

        diff_adapters(a, b)


@app.command(
    "from-lora",
    epilog="[b]Example[/b]   spallm-adapter from-lora ./lora --base ./base-spallm-4bit "
    "--calibration text.txt -o support",
)
def from_lora(
    source: Annotated[
        str, typer.Argument(help="A PEFT LoRA's directory, or a model that was fine-tuned whole.")
    ],
    base: Annotated[str, _Option(help="What spallm-compress made of the original.")],
    output: _Output,
    original: Annotated[
        Optional[str],
        _Option(
            help="What the base was compressed from: only what differs from it is moved. Without "
            "it a fine-tuned model's weights are taken as they are."
        ),
    ] = None,
    calibration: Annotated[
        Optional[str],
        _Option(metavar="TEXT", help="A .txt or .jsonl file, or hf:DATASET, to weigh errors by."),
    ] = None,
    samples: Annotated[int, _Option(help="Calibration windows at most.", min=1)] = 64,
    seqlen: Annotated[int, _Option(help="Tokens in a window.", min=8)] = 512,
) -> None:
    """Move a fine-tune that is there already onto a base's codes, as tables; without training.

    For every layer that the fine-tune changed, the tables are the closest that the codes allow: to
    its outputs on the calibration text, or, without one, to its weights. What they could not hold
    is printed. Where that is too much, serve the LoRA as it is, or train tables (spallm-train).
    """
    with user_errors():
        quiet_libraries()
        from spallm_serve.adapters_store.command import convert_fine_tune

        text = None if calibration is None else (calibration, samples, seqlen)
        convert_fine_tune(source, base, output, original, text)


_Server = Annotated[
    str, _Option(envvar="SPALLM_SERVER", help="Its address, e.g. http://127.0.0.1:8000.")
]
_Key = Annotated[str, _Option(envvar="SPALLM_KEY", help="A key with the scope adapters.")]
_Name = Annotated[str, typer.Argument(help="support, or acme/support.")]
_HERE = "http://127.0.0.1:8000"


@app.command(epilog="[b]Example[/b]   SPALLM_KEY=... spallm-adapter push ./adapter --as support")
def push(
    adapter: _Adapter,
    name: Annotated[str, _Option("--as", help="What it will be asked for by.")],
    key: _Key,
    server: _Server = _HERE,
    dry_run: Annotated[
        bool, _Option("--dry-run", help="Only ask whether it would be taken.")
    ] = False,
) -> None:
    """Upload an adapter to a server and release it; it answers at once."""
    with user_errors():
        from spallm_serve.adapters_store.remote import RemoteAdapters

        RemoteAdapters(server, key).push(adapter, name, dry_run=dry_run)


@app.command("list")
def list_adapters(
    key: _Key,
    server: _Server = _HERE,
    as_json: Annotated[bool, _Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the adapters on a server that the key's tenant may see."""
    with user_errors():
        from spallm_serve.adapters_store.remote import RemoteAdapters

        RemoteAdapters(server, key).show(as_json=as_json)


@app.command()
def rollback(name: _Name, key: _Key, server: _Server = _HERE) -> None:
    """Let a name stand for what was released before."""
    with user_errors():
        from spallm_serve.adapters_store.remote import RemoteAdapters

        RemoteAdapters(server, key).rollback(name)


@app.command()
def delete(
    name: _Name,
    key: _Key,
    server: _Server = _HERE,
    version: Annotated[Optional[str], _Option(help="Only this one, by its whole digest.")] = None,
) -> None:
    """Delete an adapter on a server, or one version that is not released."""
    with user_errors():
        from spallm_serve.adapters_store.remote import RemoteAdapters

        RemoteAdapters(server, key).delete(name, version)
