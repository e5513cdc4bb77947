"""What products of integers cost in quality: the loss on a text, in vLLM, beside float32's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spallm_serve.benchmarks.apart import measured_apart
from spallm_serve.benchmarks.records import Record
from spallm_serve.errors import UserError
from spallm_serve.kernels.cpu.integers import INTEGERS_VARIABLE, LARGEST_ENTRY, why_no_integers

_WINDOW = 512
# Read at a time: fewer than the BLAS would multiply.
_CHUNK = 64


def integer_records(base: Path, text: Path, windows: int) -> Iterator[Record]:
    """The mean loss with each kind of integers, and by how much tokens' losses differ.

    Args:
        base: what ``spallm-compress`` made.
        text: to judge on; its first windows of 512 tokens.
        windows: how many.

    Raises:
        UserError: the text is too short, or this processor has no instructions for integers.
    """
    reasons = {dtype: why_no_integers(dtype) for dtype in LARGEST_ENTRY}
    if all(reasons.values()):
        raise UserError("; ".join(filter(None, reasons.values())))
    told = {"model": str(base), "text": str(text), "windows": windows}

    def losses(bits: int) -> Tensor:
        found = measured_apart(__name__, told, {INTEGERS_VARIABLE: str(bits)})["losses"]
        return torch.tensor(found, dtype=torch.float64)

    float32 = losses(0)
    for dtype, reason in reasons.items():
        if reason is None:
            bits = torch.iinfo(dtype).bits
            yield from _compared({"base": base.name, "bits": bits}, losses(bits), float32)


def _compared(
    case: dict[str, str | int | float | bool | None], ours: Tensor, theirs: Tensor
) -> Iterator[Record]:
    difference = ours - theirs
    mean, error = float(difference.mean()), float(difference.std()) / len(difference) ** 0.5
    case["tokens"] = len(ours)
    yield Record(
        bench="integers",
        case=case,
        metric="loss",
        ours=round(float(ours.mean()), 5),
        peer=round(float(theirs.mean()), 5),
        peer_name="products in float32",
        runs=len(ours),
    )
    yield Record(
        bench="integers",
        case=case,
        metric="loss_more_than_in_float32",
        ours=round(mean, 6),
        runs=len(ours),
        spread=(round(mean - error, 6), round(mean + error, 6)),
    )
    yield Record(
        bench="integers",
        case=case,
        metric="rms_of_differences_by_token",
        ours=round(float(difference.square().mean().sqrt()), 6),
        runs=len(ours),
    )


def prompt_losses(model: str, text: str, windows: int) -> list[float]:
    """The loss of every token but the first of each window.

    Args:
        model: directory.
        text: file.
        windows: of the text.

    Raises:
        UserError: the text is too short.
    """
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < windows * _WINDOW:
        raise UserError(f"{text}: {len(ids)} tokens, {windows} windows of {_WINDOW} were asked for")
    engine = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=_WINDOW + 1, max_num_seqs=1,
        max_num_batched_tokens=_CHUNK, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    losses: list[float] = []
    for start in range(0, windows * _WINDOW, _WINDOW):
        prompt: Any = {"prompt_token_ids": ids[start : start + _WINDOW]}
        (answer,) = engine.generate([prompt], sampling, use_tqdm=False)
        told = answer.prompt_logprobs or []
        losses += [-found.logprob for place in told[1:] for found in (place or {}).values()]
    return losses


if __name__ == "__main__":
    print(json.dumps({"losses": prompt_losses(**json.loads(sys.argv[1]))}))
