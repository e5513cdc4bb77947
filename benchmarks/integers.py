"""What products of integers, and of bfloat16, cost in quality: the loss on a text, in vLLM."""

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
from spallm_serve.precision import bfloat16_is_native

_WINDOW = 512
# What the environment has for tables that are no integers.
_NONE = 0
# Read at a time: fewer than the BLAS would multiply.
_CHUNK = 64


def integer_records(base: Path, text: Path, windows: int) -> Iterator[Record]:
    """The mean loss with each kind of integers, and by how much tokens' losses differ.

    Activations are float32, and bfloat16, too, where the processor multiplies that; then also with
    tables that are no integers.

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
    integers = [torch.iinfo(dtype).bits for dtype, reason in reasons.items() if reason is None]
    kinds = [("float32", bits) for bits in integers]
    if bfloat16_is_native(torch.device("cpu")):
        kinds += [("bfloat16", bits) for bits in (_NONE, *integers)]

    def losses(dtype: str, bits: int) -> Tensor:
        told = {"model": str(base), "text": str(text), "windows": windows, "dtype": dtype}
        found = measured_apart(__name__, told, {INTEGERS_VARIABLE: str(bits)})["losses"]
        return torch.tensor(found, dtype=torch.float64)

    float32 = losses("float32", _NONE)
    for dtype, bits in kinds:
        case: dict[str, str | int | float | bool | None] = {"base": base.name, "activations": dtype}
        case["tables"] = f"int{bits}" if bits else "floats"
        yield from _compared(case, losses(dtype, bits), float32)


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


def prompt_losses(model: str, text: str, windows: int, dtype: str) -> list[float]:
    """The loss of every token but the first of each window.

    Args:
        model: directory.
        text: file.
        windows: of the text.
        dtype: vLLM's.

    Raises:
        UserError: the text is too short.
    """
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < windows * _WINDOW:
        raise UserError(f"{text}: {len(ids)} tokens, {windows} windows of {_WINDOW} were asked for")
    engine = LLM(
        model, dtype=dtype, enforce_eager=True, max_model_len=_WINDOW + 1, max_num_seqs=1,
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
