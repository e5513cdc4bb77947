"""The command ``spallm-bench``: every claim has a command that measures it."""

from __future__ import annotations

import json as json_module
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from spallm_serve.console import quiet_libraries, user_errors
from spallm_serve.errors import UserError

if TYPE_CHECKING:
    from spallm_serve.benchmarks.records import BenchmarkResults, Record

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Measure what is claimed. Results are JSON records with machine, versions and command.",
)

_Json = Annotated[Optional[Path], typer.Option("--json", help="Where the results go.")]
_Model = Annotated[
    Optional[str], typer.Option("--model", help="Default: the packaged SmolLM2-135M-Instruct.")
]
_Scratch = Annotated[
    Optional[Path], typer.Option(help="Folder for models; default a temporary one.")
]


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
    model: _Model = None,
    scratch: _Scratch = None,
    json: _Json = None,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Keep what the same command has measured so far.")
    ] = False,
) -> None:
    """Perplexity, KL and bits per weight of ours and of every peer, on one harness.

    All peers take hours on a small machine; a run that was stopped can go on.
    """
    with _measuring(scratch) as folder:
        from spallm_serve.benchmarks import quality as bench

        kept = _measured_before(json) if go_on else []
        variants = [_variant(text) for text in variant or ("bits=4", "bits=3", "bits=2")]
        records = bench.quality_records(
            _model_dir(model, folder),
            calibration,
            text,
            variants,
            bench.chosen_peers(peers),
            folder,
            windows=windows,
            samples=samples,
            skip=len(kept),
        )
        _finish(records, json, kept)


@app.command()
def tuning(
    data: Annotated[Path, typer.Option(help="Text to learn, e.g. valid.txt.")],
    text: Annotated[Path, typer.Option(help="Text to judge on, e.g. test.txt.")],
    run: Annotated[
        list[str],
        typer.Option(help="METHOD/BASE or METHOD/BASE/SETTINGS, e.g. lut/bits=2, lora/dense."),
    ],
    steps: Annotated[int, typer.Option(help="Optimizer steps of each.")] = 120,
    shared: Annotated[
        str, typer.Option("--settings", help="Of the trainer, for all runs.")
    ] = "max_length=256,batch_size=4,accumulation=1",
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens to judge on.")] = 64,
    model: _Model = None,
    scratch: _Scratch = None,
    json: _Json = None,
) -> None:
    """Perplexity before and after fine-tuning, for methods, bases and their controls."""
    with _measuring(scratch) as folder:
        from spallm_serve.benchmarks.tuning import parse_run, tuning_records

        runs = [parse_run(each, _variant) for each in run]
        records = tuning_records(
            _model_dir(model, folder),
            data,
            text,
            runs,
            folder,
            steps=steps,
            shared=_variant(shared),
            windows=windows,
        )
        _finish(records, json)


@app.command()
def training(
    data: Annotated[Path, typer.Option(help="Rows to learn, e.g. boolq's train.json.")],
    variant: Annotated[
        list[str],
        typer.Option(help="METHOD/BASE or METHOD/BASE/SETTINGS, e.g. lut/bits=4, smt/dense."),
    ],
    blocks: Annotated[
        int, typer.Option(help="Blocks of a random Llama, 2048 wide; 0 is SmolLM2 itself.")
    ] = 0,
    rows: Annotated[int, typer.Option(help="Rows in a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in a row at most.")] = 256,
    bfloat16: Annotated[bool, typer.Option(help="Activations in bfloat16.")] = True,
    seconds: Annotated[float, typer.Option(help="For all timed steps.")] = 120.0,
    scratch: _Scratch = None,
    json: _Json = None,
) -> None:
    """Time, kept activations and operations of a training step, against PEFT's LoRA."""
    with _measuring(scratch) as folder:
        import torch

        from spallm_serve.benchmarks.model import write_random_llama
        from spallm_serve.benchmarks.training import Variant, real_batches, training_records
        from spallm_serve.benchmarks.tuning import parse_run
        from spallm_serve.models import load_tokenizer

        packaged = _model_dir(None, folder)
        model = write_random_llama(folder / "llama", blocks) if blocks else packaged
        vocabulary = json_module.loads((model / "config.json").read_text())["vocab_size"]
        batches = real_batches(
            data, load_tokenizer(packaged), vocabulary, count=4, rows=rows, length=length
        )
        runs = [(text, parse_run(text, _variant)) for text in variant]
        variants = [
            Variant(text, run.method, None if run.base is None else run.base["bits"], run.settings)
            for text, run in runs
        ]
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        _finish(
            training_records(model, batches, variants, folder, dtype=dtype, seconds=seconds), json
        )


@app.command()
def lloyd(json: _Json = None) -> None:
    """Seconds for the tables of a 4096 x 4096 matrix on one core."""
    with _measuring(None):
        from spallm_serve.benchmarks.lloyd import lloyd_records

        _finish(iter(lloyd_records()), json)


@app.command()
def kernels(
    model: Annotated[
        Optional[list[str]], typer.Option(help="Whose shapes; may be repeated. Default: all.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each comparison.")] = 0.5,
    plot: Annotated[Optional[Path], typer.Option(help="Where a PNG of the ratios goes.")] = None,
    json: _Json = None,
) -> None:
    """lut_linear against torch's bfloat16 linear and LoRAs, interleaved in one process."""
    with _measuring(None):
        from spallm_serve.benchmarks.kernels import SHAPES, kernel_records

        unknown = [name for name in model or () if name not in SHAPES]
        if unknown:
            raise UserError(f"--model {unknown[0]!r}: expected some of {', '.join(SHAPES)}")
        found = _finish(kernel_records(tuple(model or SHAPES), seconds), json)
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
    model: _Model = None,
    scratch: _Scratch = None,
    json: _Json = None,
) -> None:
    """Tokens a second through transformers' generate, beside the original in bfloat16."""
    with _measuring(scratch) as folder:
        from spallm_serve.benchmarks.generation import generation_records

        chosen = variant or ("bits=4", "bits=3", "bits=2", "bits=4,embeddings=4")
        variants = [_variant(text) for text in chosen]
        source = _model_dir(model, folder)
        _finish(generation_records(source, folder, variants, new_tokens, seconds), json)


@app.command()
def memory(
    blocks: Annotated[
        Optional[list[int]], typer.Option(help="Depths; 22 blocks make 1.1 B parameters.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits to compress to.")] = 2,
    scratch: _Scratch = None,
    json: _Json = None,
) -> None:
    """Peak memory of compressing random Llamas of several depths against the promised bound."""
    with _measuring(scratch) as folder:
        from spallm_serve.benchmarks.memory import memory_records

        _finish(memory_records(folder, tuple(blocks or (2, 22)), bits), json)


@app.command()
def resume(
    kills: Annotated[int, typer.Option(help="How many kill -9.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    model: _Model = None,
    option: Annotated[
        Optional[list[str]], typer.Option(help="Further option of spallm-compress; repeat it.")
    ] = None,
    scratch: _Scratch = None,
    json: _Json = None,
) -> None:
    """Kill a run at random moments; the finished directory must be the same to the byte."""
    with _measuring(scratch) as folder:
        from spallm_serve.benchmarks.resume import resume_records

        quick = ["--samples", "4", "--seqlen", "64", "--refine", "2"]
        source = _model_dir(model, folder)
        _finish(iter(resume_records(source, folder, option or quick, kills, seed)), json)


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


def _variant(text: str) -> dict[str, Any]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(separator for _, separator, _ in pairs):
        raise UserError(f"--variant {text!r}: expected name=value,name=value")
    return {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return json_module.loads(text)
    except ValueError:
        return text


@contextmanager
def _measuring(scratch: Path | None) -> Iterator[Path]:
    """The environment all measurements share, and a folder that goes away unless it was named."""
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        quiet_libraries()
        import torch

        torch.set_float32_matmul_precision("medium")
        folder = scratch if scratch is not None else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _model_dir(model: str | None, folder: Path) -> Path:
    from spallm_serve.benchmarks.model import packaged_model
    from spallm_serve.models import resolve_model

    unpacked = folder / "model"
    return packaged_model(unpacked) if model is None else resolve_model(model, unpacked)


def _measured_before(path: Path | None) -> list[Record]:
    """The records of an earlier run of this very command, in its order."""
    from spallm_serve.benchmarks.records import BenchmarkResults, results

    if path is None or not path.is_file():
        return []
    found = BenchmarkResults.model_validate_json(path.read_text())
    if found.command != results([]).command:
        raise UserError(f"{path}: was made by another command ({found.command})")
    return found.records


def _finish(
    records: Iterator[Record] | list[Record], path: Path | None, kept: Sequence[Record] = ()
) -> BenchmarkResults:
    """Take the records as they come; after each one the file holds all there are.

    Args:
        records: new ones.
        path: the file.
        kept: those it held before.
    """
    from rich.console import Console

    from spallm_serve.benchmarks.records import results, write_results

    console = Console()
    taken = [*kept]
    for record in records:
        taken.append(record)
        figures = record.model_dump(exclude_none=True, exclude={"bench", "better"})
        console.print(figures)
        if path is not None:
            write_results(results(taken), path)
    return results(taken)
