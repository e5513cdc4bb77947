"""The command ``spallm-compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from spallm_serve.console import quiet_libraries, user_errors
from spallm_serve.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_EPILOG = """
[b]Examples[/b]

spallm-compress ./SmolLM2-135M --bits 4

spallm-compress model.gguf --bits 2 --refine 100 --calibration mine.txt

spallm-compress org/model --target-bits 2.5 --bits-for '*.down_proj=4' --dry-run
"""


@app.command(epilog=_EPILOG)
def main(
    model: Annotated[
        str, typer.Argument(help="Local Hugging Face directory, .gguf file or hub id.")
    ],
    bits: Annotated[int, typer.Option(help="Bits per code: 2, 3 or 4.", min=2, max=4)] = 4,
    groups_per_row: Annotated[
        int, typer.Option(help="Column groups with a table each; must divide every width.")
    ] = 1,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Default: NAME-spallm-BITSbit.")
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(help="A .txt or .jsonl file, hf:DATASET, or self: text the model writes."),
    ] = "self",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    weight_exponent: Annotated[
        float, typer.Option(help="p of the Lloyd weights U_jj^-p; 0 is unweighted.")
    ] = 2.0,
    damping: Annotated[
        float, typer.Option(help="Share of the mean diagonal added to the Hessian.")
    ] = 0.1,
    refit: Annotated[
        bool, typer.Option(help="Refit tables and codes under the full Hessian after rounding.")
    ] = True,
    drift_correction: Annotated[
        bool,
        typer.Option(help="Aim at the original's outputs on the compressed model's inputs."),
    ] = True,
    refine: Annotated[
        int, typer.Option(metavar="STEPS", help="Distil from the original for so many steps.")
    ] = 0,
    estimator_rank: Annotated[
        int, typer.Option(help="Rank of the SVD estimators for SparseLoRA; 0 writes none.")
    ] = 8,
    target_bits: Annotated[
        Optional[float],
        typer.Option(help="Choose bits per layer for this average, tables counted, e.g. 2.5."),
    ] = None,
    bits_for: Annotated[
        Optional[list[str]],
        typer.Option(metavar="GLOB=BITS", help="Bits for some layers; may be repeated."),
    ] = None,
    skip: Annotated[
        Optional[list[str]],
        typer.Option(metavar="GLOB", help="Layers to leave alone; may be repeated."),
    ] = None,
    embeddings: Annotated[
        Optional[int],
        typer.Option(metavar="BITS", help="Also compress the embedding and the output head."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say size, memory and time; write nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same machine: same bytes.")] = 0,
    resume: Annotated[
        bool,
        typer.Option(help="Take up an unfinished run in the output; --no-resume starts afresh."),
    ] = True,
) -> None:
    """Compress a language model once to 2-4 bit codes and small lookup tables.

    The result is an ordinary Hugging Face directory: [b]import spallm_serve[/b], then
    AutoModelForCausalLM.from_pretrained reads it. A run that was stopped is taken up where it was
    by giving the same command again.
    """
    with user_errors():
        quiet_libraries()
        from spallm_serve.compressor.settings import parse_settings

        settings = parse_settings(
            {
                "bits": bits,
                "groups_per_row": groups_per_row,
                "calibration": calibration,
                "samples": samples,
                "seqlen": seqlen,
                "weight_exponent": weight_exponent,
                "damping": damping,
                "refit": refit,
                "drift_correction": drift_correction,
                "refine_steps": refine,
                "estimator_rank": estimator_rank,
                "target_bits": target_bits,
                "bits_for": tuple(_pattern_bits(text) for text in bits_for or ()),
                "skip": tuple(skip or ()),
                "embeddings": embeddings,
                "device": device,
                "seed": seed,
            }
        )
        from spallm_serve.compressor.command import run_command

        run_command(model, output, settings, dry_run=dry_run, resume=resume)


def _pattern_bits(text: str) -> tuple[str, int]:
    pattern, separator, number = text.rpartition("=")
    if not separator or number not in ("2", "3", "4"):
        raise UserError(f"--bits-for {text!r}: expected GLOB=BITS with 2, 3 or 4 bits")
    return pattern, int(number)
