"""Tokens a second of a compressed model and of the original, generated through transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spallm_serve.benchmarks.quick_base import quick_base
from spallm_serve.benchmarks.records import Record
from spallm_serve.benchmarks.timing import interleaved
from spallm_serve.models import load_tokenizer

_PROMPT = "Write a long story about a lighthouse keeper and the sea."


def generation_records(
    model_dir: Path, scratch: Path, variants: list[dict[str, Any]], new_tokens: int, seconds: float
) -> Iterator[Record]:
    """Generate greedily, one sequence, with the original and with each variant in turn.

    All run in bfloat16 in one process; the calls alternate. A call is the prompt and all new
    tokens.

    Args:
        model_dir: the original.
        scratch: for the compressed models.
        variants: settings of ours.
        new_tokens: tokens a call generates.
        seconds: for all calls together.
    """
    console = Console(stderr=True)
    tokenizer = load_tokenizer(model_dir)
    prompt = tokenizer(_PROMPT, return_tensors="pt")["input_ids"]
    calls = {"original": _generate(model_dir, prompt, new_tokens)}
    for number, variant in enumerate(variants):
        base = quick_base(model_dir, scratch / f"generation-{number}", variant)
        calls[str(number)] = _generate(base, prompt, new_tokens)
    with torch.inference_mode():
        times = interleaved(calls, seconds)
    original = times["original"]
    for number, variant in enumerate(variants):
        ours = times[str(number)]
        record = Record(
            bench="generation",
            case={"prompt_tokens": prompt.shape[1], "new_tokens": new_tokens, **variant},
            metric="tokens_per_s",
            ours=round(new_tokens / ours.median, 2),
            peer=round(new_tokens / original.median, 2),
            peer_name="the original in bfloat16",
            ratio=round(original.median / ours.median, 3),
            better="higher",
            runs=ours.runs,
            spread=(round(new_tokens / ours.high, 2), round(new_tokens / ours.low, 2)),
        )
        console.print(
            f"{variant}: {record.ours} tokens/s, the original {record.peer}: {record.ratio} x"
        )
        yield record


def _generate(model_dir: Path, prompt: torch.Tensor, new_tokens: int) -> Callable[[], object]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()

    def generate() -> object:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
        )

    return generate
