"""The command ``spallm-bench``: every claim has a command that measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from spallm_serve.benchmarks.command import (
    Dtype,
    Json,
    Model,
    Scratch,
    finish,
    measured_before,
    measuring,
    model_directory,
    parse_pairs,
)
from spallm_serve.benchmarks.serve_cli import serve
from spallm_serve.benchmarks.training_cli import training, training_memory, tuning
from spallm_serve.console import user_errors
from spallm_serve.errors import UserError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Measure what is claimed. Results are JSON records with machine, versions and command.",
)

for _command in (tuning, training, training_memory, serve):
    app.command()(_command)


@app.command()
def quality(
    calibration: Annotated[Path, typer.Option(help="Text to compress on, e.g. valid.txt.")],
    text: Annotated[Path, typer.Option(help="Text to judge on, e.g. test.txt.")],
    variant: Annotated[
        Optional[list[str]],
        typer.Option(help="Settings of ours, e.g. bits=2,refine_steps=60; may be repeated."),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(help="'all', 'none', or of benchmarks/peers MODULE or MODULE:SETTING,..."),
    ] = "all",
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens to judge on.")] = 64,
    samples: Annotated[int, typer.Option(help="Windows of 512 tokens to compress on.")] = 128,
    model: Model = None,
    scratch: Scratch = None,
    json: Json = None,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Keep what the same command has measured so far.")
    ] = False,
) -> None:
    """Perplexity, KL and bits per weight of ours and of every peer, on one harness.

    All peers take hours on a small machine; a run that was stopped can go on.
    """
    with measuring(scratch) as folder:
        from spallm_serve.benchmarks import quality as bench

        kept = measured_before(json) if go_on else []
        variants = [parse_pairs(text) for text in variant or ("bits=4", "bits=3", "bits=2")]
        records = bench.quality_records(
            model_directory(model, folder),
            calibration,
            text,
            variants,
            bench.chosen_peers(peers),
            folder,
            windows=windows,
            samples=samples,
            skip=len(kept),
        )
        finish(records, json, kept)


@app.command()
def engine(
    variant: Annotated[
        str, typer.Option(help="Settings of ours, e.g. bits=4,embeddings=4.")
    ] = "bits=4",
    tenants: Annotated[int, typer.Option(help="Requests at a time, each of its own tenant.")] = 8,
    tokens: Annotated[int, typer.Option(help="That each decodes.")] = 64,
    rounds: Annotated[int, typer.Option(help="Of each mixture.")] = 5,
    dtype: Dtype = "bfloat16",
    model: Model = None,
    base: Annotated[
        Optional[Path], typer.Option(help="What was made of the model; default: made here.")
    ] = None,
    scratch: Scratch = None,
    json: Json = None,
) -> None:
    """Decode throughput in vLLM: base alone and many tenants, beside the original and LoRAs."""
    with measuring(scratch) as folder:
        from spallm_serve.benchmarks.engine import engine_records
        from spallm_serve.benchmarks.quick_base import quick_base

        source = model_directory(model, folder)
        served = base or quick_base(source, folder / "engine-base", parse_pairs(variant))
        records = engine_records(
            source, served, folder, tenants=tenants, tokens=tokens, rounds=rounds, dtype=dtype
        )
        finish(records, json)


@app.command()
def integers(
    base: Annotated[Path, typer.Option(help="What spallm-compress made.")],
    text: Annotated[Path, typer.Option(help="Text to judge on, e.g. test.txt.")],
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens to judge on.")] = 8,
    json: Json = None,
) -> None:
    """The loss in vLLM with tables held as integers, and with bfloat16, beside float32's."""
    with measuring(None):
        from spallm_serve.benchmarks.integers import integer_records

        finish(integer_records(base, text, windows), json)


@app.command()
def lloyd(json: Json = None) -> None:
    """Seconds for the tables of a 4096 x 4096 matrix on one core."""
    with measuring(None):
        from spallm_serve.benchmarks.lloyd import lloyd_records

        finish(iter(lloyd_records()), json)


@app.command()
def kernels(
    model: Annotated[
        Optional[list[str]], typer.Option(help="Whose shapes; may be repeated. Default: all.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each comparison.")] = 0.5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Dtype = "bfloat16",
    plot: Annotated[Optional[Path], typer.Option(help="Where a PNG of the ratios goes.")] = None,
    json: Json = None,
) -> None:
    """lut_linear against torch's linear and LoRAs, interleaved in one process."""
    with measuring(None):
        import torch

        if device not in ("cpu", "cuda"):
            raise UserError(f"--device {device!r}: expected cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here")

        from spallm_serve.benchmarks.kernels import SHAPES, kernel_records

        unknown = [name for name in model or () if name not in SHAPES]
        if unknown:
            raise UserError(f"--model {unknown[0]!r}: expected some of {', '.join(SHAPES)}")
        found = finish(
            kernel_records(tuple(model or SHAPES), seconds, device, getattr(torch, dtype)), json
        )
        if plot is not None:
            from spallm_serve.benchmarks.plots import plot_kernels

            plot_kernels(found, plot)


@app.command()
def generation(
    variant: Annotated[
        Optional[list[str]],
        typer.Option(help="Settings of ours, e.g. bits=4,embeddings=4; may be repeated."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that a call generates.")] = 64,
    seconds: Annotated[float, typer.Option(help="For all calls together.")] = 60.0,
    model: Model = None,
    scratch: Scratch = None,
    json: Json = None,
) -> None:
    """Tokens a second through transformers' generate, beside the original in bfloat16."""
    with measuring(scratch) as folder:
        from spallm_serve.benchmarks.generation import generation_records

        chosen = variant or ("bits=4", "bits=3", "bits=2", "bits=4,embeddings=4")
        variants = [parse_pairs(text) for text in chosen]
        source = model_directory(model, folder)
        finish(generation_records(source, folder, variants, new_tokens, seconds), json)


@app.command()
def memory(
    blocks: Annotated[
        Optional[list[int]], typer.Option(help="Depths; 22 blocks make 1.1 B parameters.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits to compress to.")] = 2,
    scratch: Scratch = None,
    json: Json = None,
) -> None:
    """Peak memory of compressing random Llamas of several depths against the promised bound."""
    with measuring(scratch) as folder:
        from spallm_serve.benchmarks.memory import memory_records

        finish(memory_records(folder, tuple(blocks or (2, 22)), bits), json)


@app.command()
def resume(
    kills: Annotated[int, typer.Option(help="How many kill -9.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    model: Model = None,
    train: Annotated[
        Optional[Path], typer.Option(help="Kill spallm-train on these rows, not spallm-compress.")
    ] = None,
    option: Annotated[
        Optional[list[str]], typer.Option(help="Further option of the command; repeat it.")
    ] = None,
    scratch: Scratch = None,
    json: Json = None,
) -> None:
    """Kill a run at random moments; what it makes must be the same to the byte."""
    with measuring(scratch) as folder:
        from spallm_serve.benchmarks import resume as bench

        source = model_directory(model, folder)
        quick = ["--samples", "4", "--seqlen", "64"]
        if train is None:
            command = bench.compressing(source, option or [*quick, "--refine", "2"])
        else:
            base = folder / "base"
            bench.compressing(source, quick).run(base, None)
            short = ["--steps", "16", "--max-length", "256", "--set", "save_every=2"]
            command = bench.training(base, train, option or short)
        finish(iter(bench.resume_records(command, folder, kills, seed)), json)


@app.command()
def table(
    file: Annotated[Path, typer.Argument(help="Results of the quality or the kernels benchmark.")],
) -> None:
    """Print a result file as a Markdown table."""
    with user_errors():
        from pydantic import ValidationError

        from spallm_serve.benchmarks.records import BenchmarkResults
        from spallm_serve.benchmarks.tables import result_table

        try:
            found = BenchmarkResults.model_validate_json(file.read_text())
        except (OSError, ValidationError) as error:
            raise UserError(f"{file}: not a result file ({error})") from error
        typer.echo(result_table(found))
