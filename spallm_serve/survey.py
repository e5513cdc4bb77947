"""One pass over training data before it is learnt: whether all of it can be, and how much it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from spallm_serve.batches import ExampleStream
from spallm_serve.examples import IGNORED


@dataclass(frozen=True)
class DataSurvey:
    """What a pass over a stream brings.

    Attributes:
        rows: of the stream; as many as ``examples`` unless these are packed, and packed in the
            order of another epoch it may be a few more or less.
        examples: in the file.
        truncated: examples that were cut to fit.
        tokens: of all rows, without padding.
        loss_tokens: those that are learnt.
        context_tokens: those that neither are learnt nor predict one that is.
    """

    rows: int
    examples: int
    truncated: int
    tokens: int
    loss_tokens: int
    context_tokens: int

    @property
    def context_share(self) -> float:
        """Share of the tokens that is context."""
        return self.context_tokens / self.tokens

    def __str__(self) -> str:
        cut = f", {self.truncated:,} of them cut to fit" if self.truncated else ""
        return (
            f"{self.examples:,} examples{cut}; {self.tokens:,} tokens, "
            f"{self.loss_tokens / self.tokens:.0%} of them learnt"
        )


def survey(stream: ExampleStream) -> DataSurvey:
    """Read a stream once, to its end; it is left as it was.

    A bad row is found now and not after hours of training.

    Raises:
        UserError: the file, or a row of it, cannot be learnt from.
    """
    own = copy.copy(stream)
    rows = tokens = learnt = context = 0
    for row in own:
        labels = row["labels"]
        rows += 1
        tokens += len(labels)
        learnt += sum(label != IGNORED for label in labels)
        context += sum(
            label == IGNORED and following == IGNORED
            for label, following in zip(labels, [*labels[1:], IGNORED], strict=True)
        )
    return DataSurvey(rows, own.seen, own.truncated, tokens, learnt, context)
