"""What a tuned model is judged by: perplexity on a text, loss on held-out rows, questions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spallm_serve.batches import ExampleStream, collate
from spallm_serve.choices import accuracy, read_questions
from spallm_serve.data import file_windows
from spallm_serve.evaluation import Estimate, perplexity, token_loss_estimate
from spallm_serve.examples import IGNORED
from spallm_serve.trainer.model import LossModel

SEQLEN = 512
PERPLEXITY = "perplexity"
LOSS = "held_out_loss"
ACCURACY = "accuracy"

Judge = Callable[[PreTrainedModel], Estimate]


def make_judges(
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: Path | None,
    windows: int,
    held_out: Path | None,
    rows: int,
    max_length: int,
    questions: list[Path],
    limit: int,
) -> dict[tuple[str, str], Judge]:
    """Judges by metric and by what it is measured on.

    Args:
        tokenizer: of all models.
        text: for perplexity.
        windows: of it.
        held_out: rows as they are trained on, for the loss of their outputs.
        rows: of them.
        max_length: tokens in a row; more is cut.
        questions: files of multiple-choice questions, each in a folder with the name of its set.
        limit: questions of each.

    Raises:
        UserError: a file that cannot be read.
    """
    judges: dict[tuple[str, str], Judge] = {}
    if text is not None:
        ids = file_windows(text, tokenizer, SEQLEN, windows)
        judges[PERPLEXITY, text.name] = partial(_perplexity, windows=ids)
    if held_out is not None:
        stream = ExampleStream(held_out, tokenizer, max_length)
        batches = [collate([row], 0) for row in islice(stream, rows)]
        judges[LOSS, held_out.name] = partial(held_out_loss, batches=batches)
    for path in questions:
        asked = read_questions(path)[:limit]
        judges[ACCURACY, path.parent.name] = partial(accuracy, tokenizer=tokenizer, questions=asked)
    return judges


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> Estimate:
    """Mean loss of an output token, over batches of one row each."""
    judged = LossModel(model)
    counts = torch.tensor([int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches])
    here = ({name: part.to(model.device) for name, part in batch.items()} for batch in batches)
    means = torch.stack([judged(**batch)["loss"] for batch in here]).cpu()
    return token_loss_estimate(means * counts, counts)


def _perplexity(model: PreTrainedModel, windows: Tensor) -> Estimate:
    return perplexity(model, windows.to(model.device))
