"""What compressing costs in quality: ours and every peer on one harness, one model, one text."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from spallm_serve.benchmarks.records import Record
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import parse_settings
from spallm_serve.data import file_windows
from spallm_serve.errors import UserError
from spallm_serve.evaluation import Comparison, compare
from spallm_serve.models import load_model, load_tokenizer

PEERS = ("round_to_nearest", "kmeans", "nf4", "hqq_peer", "llamacpp", "gptqmodel_peer")
SEQLEN = 512


def chosen_peers(text: str) -> list[tuple[str, str]]:
    """(module, setting) pairs from ``all``, ``none`` or a list of ``MODULE[:SETTING]``.

    Raises:
        UserError: no such module.
    """
    chosen: list[tuple[str, str]] = []
    for part in {"all": PEERS, "none": ()}.get(text, tuple(text.split(","))):
        module, _, setting = part.partition(":")
        if module not in PEERS:
            raise UserError(f"--peers {part!r}: expected some of {', '.join(PEERS)}")
        settings = importlib.import_module(f"spallm_serve.benchmarks.peers.{module}").SETTINGS
        chosen += [(module, one) for one in ((setting,) if setting else settings)]
    return chosen


def quality_records(
    model_dir: Path,
    calibration: Path,
    text: Path,
    variants: list[dict[str, Any]],
    peers: list[tuple[str, str]],
    scratch: Path,
    *,
    windows: int,
    samples: int,
    skip: int = 0,
) -> Iterator[Record]:
    """Measure our variants, then the peers' settings, as they come.

    Perplexity, KL divergence from the original and top-1 agreement on the same windows; bits per
    weight count tables, scales, zero points and indices; seconds are of compressing alone.

    Args:
        model_dir: the original.
        calibration: text to compress on; the peers get the same windows.
        text: text to judge on.
        variants: settings of ours beside ``bits`` defaults.
        peers: modules of ``benchmarks.peers`` and their settings.
        scratch: for models.
        windows: windows of ``text`` to judge on.
        samples: windows of ``calibration``.
        skip: leave out so many, which were measured before.
    """
    console = Console(stderr=True)
    tokenizer = load_tokenizer(model_dir)
    judged_on = file_windows(text, tokenizer, SEQLEN, windows)
    tokens = file_windows(calibration, tokenizer, SEQLEN, samples)
    original = RememberedLogits(load_model(model_dir), judged_on, scratch / "original-logits")

    def judge(name: str, setting: str, bits: float, seconds: float, model: nn.Module) -> Record:
        found = compare(original, model, judged_on)
        console.print(
            f"{name} {setting}: {bits:.3f} bits/weight, perplexity {found.compressed}, "
            f"KL {found.divergence}, {seconds:.0f} s"
        )
        return _record(name, setting, bits, seconds, found, tokens)

    for number, variant in list(enumerate(variants))[skip:]:
        settings = parse_settings(
            {"calibration": str(calibration), "samples": samples, "seqlen": SEQLEN} | variant
        )
        output = scratch / f"ours-{number}"
        started = time.perf_counter()
        with _products_of("highest"):  # as spallm-compress has them
            record = compress(str(model_dir), output, settings, SilentObserver())
        seconds = time.perf_counter() - started
        setting = ", ".join(f"{key}={value}" for key, value in variant.items())
        yield judge("SpaLLM", setting, record.bits_per_weight, seconds, load_model(output))
        gc.collect()
    for name, setting in peers[max(0, skip - len(variants)) :]:
        peer = importlib.import_module(f"spallm_serve.benchmarks.peers.{name}")
        result = peer.compress(model_dir, tokens, setting, scratch)
        yield judge(result.name, setting, result.bits_per_weight, result.seconds, result.model)
        del result
        gc.collect()


@contextmanager
def _products_of(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class RememberedLogits(nn.Module):
    """A model run once on some windows; from then on it answers for them out of a mapped file.

    Args:
        model: a causal LM.
        windows: token ids, int64 ``[windows, seqlen]``.
        path: the file, of float32 ``[windows, seqlen, vocabulary]``.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, windows: Tensor, path: Path) -> None:
        super().__init__()
        self._position = {tuple(window): at for at, window in enumerate(windows.tolist())}
        for at, window in enumerate(windows.split(1)):
            logits = model(input_ids=window, use_cache=False).logits[0].float()
            if at == 0:
                size = len(windows) * logits.numel()
                mapped = torch.from_file(str(path), shared=True, size=size)
                self._logits = mapped.view(len(windows), *logits.shape)
            self._logits[at] = logits

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """The logits of one of the windows, ``[1, seqlen, vocabulary]``."""
        at = self._position[tuple(input_ids[0].tolist())]
        return SimpleNamespace(logits=self._logits[at : at + 1])


def _record(
    name: str, setting: str, bits: float, seconds: float, found: Comparison, tokens: Tensor
) -> Record:
    error = found.compressed.standard_error
    case: dict[str, str | int | float | bool | None] = {
        "method": name,
        "setting": setting,
        "bits_per_weight": round(bits, 4),
        "kl": found.divergence.value,
        "kl_standard_error": found.divergence.standard_error,
        "top1_agreement": found.agreement.value,
        "original_perplexity": found.original.value,
        "perplexity_standard_error": error,
        "seconds": round(seconds, 1),
        "calibration_tokens": tokens.numel(),
    }
    value = found.compressed.value
    ours = name == "SpaLLM"
    return Record(
        bench="quality",
        case=case,
        metric="perplexity",
        ours=value if ours else None,
        peer=None if ours else value,
        peer_name=None if ours else name,
        runs=found.windows,
        spread=(value - error, value + error),
    )
