"""What all commands share: errors as one line, warnings of libraries kept quiet, typed GLOBs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from spallm_serve.errors import UserError

USER_ERROR_EXIT = 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a :class:`UserError` as one line on standard error and exit with code 2."""
    try:
        yield
    except UserError as error:
        console = Console(stderr=True, highlight=False)
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(USER_ERROR_EXIT) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries out of our own output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Bars shown through tqdm; it reads this when it is first imported.
    os.environ["TQDM_DISABLE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
