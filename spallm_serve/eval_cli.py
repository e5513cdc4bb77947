"""The command ``spallm-eval``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from spallm_serve.console import quiet_libraries, user_errors
from spallm_serve.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Judge a model, compressed or not, with an adapter or without: perplexity, divergence "
    "from the original, choices, answers.",
)

_Model = Annotated[str, typer.Argument(help="Model directory, .gguf file or hub id.")]
_Text = Annotated[Path, typer.Option("--text", help="A .txt or .jsonl file.")]
_Windows = Annotated[int, typer.Option(help="Windows of text at most.", min=1)]
_Seqlen = Annotated[int, typer.Option(help="Tokens in a window.", min=2)]
_Adapter = Annotated[Optional[Path], typer.Option(help="An adapter of this model.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def ppl(
    model: _Model,
    text: _Text,
    windows: _Windows = 64,
    seqlen: _Seqlen = 512,
    adapter: _Adapter = None,
    as_json: _Json = False,
) -> None:
    """Perplexity of MODEL on a text, with its standard error."""
    with user_errors(), _opened(model, adapter) as (loaded, tokenizer):
        from spallm_serve.evaluation import perplexity

        ids = _windows(text, loaded, tokenizer, seqlen, windows)
        with _progress("windows", len(ids)) as step:
            found = perplexity(loaded, ids, step)
        _show({"perplexity": found}, {"windows": len(ids), "seqlen": seqlen}, as_json)


@app.command()
def compare(
    original: _Model,
    compressed: _Model,
    text: _Text,
    windows: _Windows = 64,
    seqlen: _Seqlen = 512,
    as_json: _Json = False,
) -> None:
    """What compressing cost: perplexities, mean KL divergence and top-1 agreement."""
    with (
        user_errors(),
        _opened(original) as (reference, tokenizer),
        _opened(compressed) as (judged, _),
    ):
        from spallm_serve.evaluation import compare as compare_models

        if reference.config.vocab_size != judged.config.vocab_size:
            raise UserError(
                f"the models have different vocabularies ({reference.config.vocab_size} and "
                f"{judged.config.vocab_size}); their distributions cannot be compared"
            )
        ids = _windows(text, reference, tokenizer, seqlen, windows)
        with _progress("windows", len(ids)) as step:
            found = compare_models(reference, judged, ids, step)
        _show(
            {
                "perplexity of the original": found.original,
                "perplexity of the compressed": found.compressed,
                "KL divergence (nats/token)": found.divergence,
                "top-1 agreement": found.agreement,
            },
            {"windows": found.windows, "tokens": found.tokens},
            as_json,
        )


@app.command()
def choice(
    model: _Model,
    data: Annotated[
        Path, typer.Option("--data", help="LLM-Adapters JSON: instruction, answer; or JSONL.")
    ],
    limit: Annotated[int, typer.Option(help="Questions at most.", min=1)] = 1000,
    adapter: _Adapter = None,
    as_json: _Json = False,
) -> None:
    """Accuracy on multiple-choice questions, by the likelihood of each option."""
    with user_errors(), _opened(model, adapter) as (loaded, tokenizer):
        from spallm_serve.choices import accuracy, read_questions

        questions = read_questions(data)[:limit]
        with _progress("questions", len(questions)) as step:
            found = accuracy(loaded, tokenizer, questions, step)
        _show({"accuracy": found}, {"questions": len(questions)}, as_json)


@app.command()
def ask(
    model: _Model,
    question: Annotated[str, typer.Argument(help="What a user would write.")],
    adapter: _Adapter = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the answer at most.", min=1)] = 128,
) -> None:
    """What MODEL answers to a question, greedily, through its chat template."""
    with user_errors(), _opened(model, adapter) as (loaded, tokenizer):
        from spallm_serve.evaluation import answer

        typer.echo(answer(loaded, tokenizer, question, tokens))


@contextmanager
def _opened(
    model: str, adapter: Path | None = None
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """A model in float32 with its tokenizer; a .gguf is unpacked to a folder that goes away."""
    import tempfile

    quiet_libraries()
    import torch

    from spallm_serve.models import load_model, load_tokenizer, resolve_model

    torch.set_float32_matmul_precision("medium")
    with tempfile.TemporaryDirectory() as scratch:
        directory = resolve_model(model, Path(scratch) / "model")
        loaded = load_model(directory)
        if adapter is not None:
            from spallm_serve.adapted import apply_adapter
            from spallm_serve.adapter_files import read_adapter

            apply_adapter(loaded, read_adapter(adapter))
        yield loaded, load_tokenizer(directory)


def _windows(
    text: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    limit: int,
) -> Tensor:
    from spallm_serve.data import file_windows

    windows = file_windows(text, tokenizer, seqlen, limit)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if int(windows.max()) >= vocabulary:
        raise UserError(
            f"the tokenizer gave id {int(windows.max())}, but the model has {vocabulary} "
            "embeddings; tokenizer and model do not belong together"
        )
    return windows


@contextmanager
def _progress(unit: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(unit, total=total)
        yield lambda done: bar.update(task, completed=done)


def _show(measured: dict[str, Any], facts: dict[str, int], as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    if as_json:
        figures = {name: asdict(estimate) for name, estimate in measured.items()}
        for figure in figures.values():
            # NaN, the standard error of a single observation, is no JSON.
            figure.update({key: None for key, value in figure.items() if math.isnan(value)})
        typer.echo(json.dumps(figures | facts, indent=2))
        return
    table = Table("", "value", "standard error")
    for name, estimate in measured.items():
        table.add_row(name, f"{estimate.value:.4f}", f"{estimate.standard_error:.4f}")
    console: Console = Console()
    console.print(table)
    console.print(", ".join(f"{value:,} {name}" for name, value in facts.items()))
