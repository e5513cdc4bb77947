"""The commands of ``spallm-bench`` that measure fine-tuning."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Optional

import typer

from spallm_serve.benchmarks.command import (
    Json,
    Model,
    Scratch,
    finish,
    measured_before,
    measuring,
    model_directory,
    parse_pairs,
)
from spallm_serve.errors import UserError

_RUN_HELP = "METHOD/BASE or METHOD/BASE/SETTINGS, e.g. lut/bits=2, lora/dense; repeat it."


def tuning(
    data: Annotated[
        list[Path], typer.Option(help="What to learn, .txt or rows; of several all rows, mixed.")
    ],
    run: Annotated[list[str], typer.Option(help=_RUN_HELP)],
    text: Annotated[Optional[Path], typer.Option(help="Text to judge on, for perplexity.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens of it.")] = 64,
    held_out: Annotated[
        Optional[Path], typer.Option(help="Rows to judge on, for the loss of their outputs.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Of them at most.")] = 200,
    questions: Annotated[
        Optional[list[Path]], typer.Option(help="Multiple choice to judge by, JSON; repeat it.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Questions of each file at most.")] = 200,
    calibration: Annotated[
        Optional[Path],
        typer.Option(help="Of compressed bases; default: the data if it is text, else none."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each.")] = 120,
    seeds: Annotated[int, typer.Option(help="Runs of each, with other rows first.")] = 1,
    shared: Annotated[
        str, typer.Option("--settings", help="Of the trainer, for all runs.")
    ] = "max_length=256,batch_size=4,accumulation=1",
    model: Model = None,
    scratch: Scratch = None,
    json: Json = None,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Keep what the same command has measured so far.")
    ] = False,
) -> None:
    """Perplexity, loss and accuracy before and after fine-tuning, for methods, bases, controls."""
    with measuring(scratch) as folder:
        from spallm_serve.benchmarks.judges import make_judges
        from spallm_serve.benchmarks.tuning import combined, parse_run, tuning_records
        from spallm_serve.models import load_tokenizer

        if text is None and held_out is None and not questions:
            raise UserError("nothing to judge by: give --text, --held-out or --questions")
        runs = [parse_run(each, parse_pairs) for each in run]
        told = parse_pairs(shared)
        source = model_directory(model, folder)
        learnt = combined(data, folder)
        judges = make_judges(
            load_tokenizer(source),
            text=text,
            windows=windows,
            held_out=held_out,
            rows=rows,
            max_length=int(told.get("max_length", 512)),
            questions=questions or [],
            limit=limit,
        )
        if calibration is None and learnt.suffix == ".txt":
            calibration = learnt
        kept = measured_before(json) if go_on else []
        records = tuning_records(
            source,
            learnt,
            judges,
            runs,
            folder,
            calibration=calibration,
            steps=steps,
            seeds=seeds,
            shared=told,
            skip=len(kept),
        )
        finish(records, json, kept)


def training(
    data: Annotated[Path, typer.Option(help="Rows to learn, e.g. boolq's train.json.")],
    variant: Annotated[list[str], typer.Option(help=_RUN_HELP)],
    blocks: Annotated[
        int, typer.Option(help="Blocks of a random Llama, 2048 wide; 0 is SmolLM2 itself.")
    ] = 0,
    rows: Annotated[int, typer.Option(help="Rows in a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in a row at most.")] = 256,
    bfloat16: Annotated[bool, typer.Option(help="Activations in bfloat16.")] = True,
    seconds: Annotated[float, typer.Option(help="For all timed steps.")] = 120.0,
    plot: Annotated[Optional[Path], typer.Option(help="Where a PNG of the ratios goes.")] = None,
    scratch: Scratch = None,
    json: Json = None,
) -> None:
    """Time, kept activations and operations of a training step, against PEFT's LoRA."""
    with measuring(scratch) as folder:
        import torch

        from spallm_serve.benchmarks.model import write_random_llama
        from spallm_serve.benchmarks.training import parse_variant, real_batches, training_records
        from spallm_serve.models import load_tokenizer

        packaged = model_directory(None, folder)
        model = write_random_llama(folder / "llama", blocks) if blocks else packaged
        vocabulary = json_module.loads((model / "config.json").read_text())["vocab_size"]
        batches = real_batches(
            data, load_tokenizer(packaged), vocabulary, count=4, rows=rows, length=length
        )
        variants = [parse_variant(each, parse_pairs) for each in variant]
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        found = finish(
            training_records(model, batches, variants, folder, dtype=dtype, seconds=seconds), json
        )
        if plot is not None:
            from spallm_serve.benchmarks.plots import plot_training

            plot_training(found, plot)


def training_memory(
    variant: Annotated[list[str], typer.Option(help=_RUN_HELP)],
    blocks: Annotated[
        int, typer.Option(help="Blocks of a random Llama; 22 make 1.1 B parameters.")
    ] = 22,
    rows: Annotated[int, typer.Option(help="Rows in a step.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 256,
    scratch: Scratch = None,
    json: Json = None,
) -> None:
    """Peak memory of a process that trains, against PEFT's LoRA on the bfloat16 base."""
    with measuring(scratch) as folder:
        from spallm_serve.benchmarks.training import parse_variant
        from spallm_serve.benchmarks.training_memory import training_memory_records

        variants = [parse_variant(each, parse_pairs) for each in variant]
        finish(training_memory_records(variants, folder, blocks, rows, length), json)
