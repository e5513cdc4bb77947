"""The command ``spallm-train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from spallm_serve.console import quiet_libraries, user_errors
from spallm_serve.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_EPILOG = """
[b]Examples[/b]

spallm-train ./base-spallm-4bit --data mine.jsonl -o adapter

spallm-train ./base-spallm-2bit --data mine.jsonl --rows 0.25 --epochs 3 -o adapter

spallm-train ./base --data mine.jsonl --method sparselora --sparsity auto -o adapter

spallm-train --init-config > train.yaml; spallm-train --config train.yaml -o adapter

[b]Defaults[/b] of all that is not given, and every other setting: --init-config.

[b]Rows of data[/b], found automatically: "messages"; "conversations"; "prompt" and "completion";
"instruction", "input" and "output"; "question" and "answer"; or "text".
"""

_Option = typer.Option


@app.command(epilog=_EPILOG)
def main(
    base: Annotated[
        Optional[str], typer.Argument(help="What spallm-compress made, or a dense model.")
    ] = None,
    data: Annotated[Optional[Path], _Option(help="Rows to learn: .jsonl, .json or .txt.")] = None,
    output: Annotated[
        Optional[Path], _Option("--output", "-o", help="The adapter's directory.")
    ] = None,
    method: Annotated[Optional[str], _Option(help="lut, smt or sparselora.")] = None,
    eval_data: Annotated[Optional[Path], _Option(help="Rows to judge on.")] = None,
    epochs: Annotated[Optional[float], _Option(help="Passes over the data.")] = None,
    steps: Annotated[Optional[int], _Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[Optional[int], _Option(help="Rows in a micro batch.")] = None,
    accumulation: Annotated[Optional[int], _Option(help="Micro batches in a step.")] = None,
    learning_rate: Annotated[
        Optional[float],
        _Option("--learning-rate", "--lr", help="Peak rate; 1e-3 for lut, 3e-4 for the others."),
    ] = None,
    max_length: Annotated[Optional[int], _Option(help="Tokens in a row.")] = None,
    packing: Annotated[
        Optional[bool], _Option("--packing", help="Several examples in a row.")
    ] = None,
    strict: Annotated[
        Optional[bool], _Option("--strict", help="Refuse rows that are too long.")
    ] = None,
    rows: Annotated[Optional[float], _Option(help="lut: share of rows to train.")] = None,
    share: Annotated[Optional[float], _Option(help="smt: share of weights to train.")] = None,
    rank: Annotated[Optional[int], _Option(help="sparselora: rank of the LoRA.")] = None,
    sparsity: Annotated[Optional[str], _Option(help="sparselora: o1, o2, auto, none.")] = None,
    seed: Annotated[Optional[int], _Option(help="Same seed, same machine: same bytes.")] = None,
    config: Annotated[Optional[Path], _Option(help="Settings as YAML; flags win.")] = None,
    assign: Annotated[
        Optional[list[str]],
        _Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. smt.block_size=128."),
    ] = None,
    init_config: Annotated[
        bool, _Option("--init-config", help="Print all settings as commented YAML.")
    ] = False,
    preview: Annotated[
        int, _Option(metavar="N", help="Show N examples with what is learnt of them; no training.")
    ] = 0,
    export_peft: Annotated[
        Optional[Path], _Option(help="smt: also write a stock PEFT adapter there.")
    ] = None,
    resume: Annotated[
        bool, _Option(help="Take up an unfinished run; --no-resume starts afresh.")
    ] = True,
) -> None:
    """Train a tenant's adapter on a base: its tables, sparse blocks of its weights, or a LoRA.

    Loss is on the outputs only. A run that was stopped is taken up by the same command, with the
    same result to the byte.
    """
    with user_errors():
        given: dict[str, Any] = {
            "base": base,
            "data": data,
            "method": method,
            "eval_data": eval_data,
            "epochs": epochs,
            "steps": steps,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "learning_rate": learning_rate,
            "max_length": max_length,
            "packing": packing,
            "strict": strict,
            "seed": seed,
            "lut.rows": rows,
            "smt.share": share,
            "sparselora.rank": rank,
            "sparselora.sparsity": sparsity,
        }
        quiet_libraries()
        from spallm_serve.trainer import command

        if init_config:
            command.print_config()
            return
        settings = command.gather(config, given, assign or [])
        if preview:
            command.preview_data(settings, preview)
            return
        if output is None:
            raise UserError("--output: say where the adapter goes")
        command.run_command(settings, output, resume=resume, export_peft=export_peft)
