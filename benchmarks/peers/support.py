"""What the peers share: loading, choosing the layers, packages that may be absent, measuring."""

from __future__ import annotations

import contextlib
import importlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import nn

REQUIREMENTS = "benchmarks/peers/requirements.txt"


class MissingPackageError(ImportError):
    """A package that a peer wraps is not installed."""


def require(module: str, package: str) -> ModuleType:
    """Import ``module``, or say which package would provide it and where its version is pinned."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        itself = f"{module}.".startswith(f"{error.name}.")
        absent = "" if itself else f" in full: it lacks the module {error.name!r}"
        raise MissingPackageError(
            f"this peer needs the package {package!r}{absent}; install it as {REQUIREMENTS} says",
            name=error.name,
        ) from error


def load_model(model_dir: Path) -> nn.Module:
    """Load a causal language model on the CPU in float32, in evaluation mode."""
    transformers = require("transformers", "transformers")
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32
    )
    return model.eval()


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and layer of every linear inside the transformer blocks, in model order.

    The blocks are the first ``ModuleList`` as long as ``config.num_hidden_layers``; embeddings and
    the output head lie outside it.
    """
    config: Any = model.config
    for blocks_name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) == config.num_hidden_layers:
            for name, module in blocks.named_modules(prefix=blocks_name):
                if isinstance(module, nn.Linear):
                    yield name, module
            return
    raise ValueError(f"found no list of {config.num_hidden_layers} blocks in the model")


def replace_weight(linear: nn.Linear, weight: torch.Tensor) -> None:
    """Overwrite a layer's weight ``[out, in]`` with decoded values, refusing any other shape."""
    if weight.shape != linear.weight.shape:
        raise ValueError(f"shape {tuple(weight.shape)} for {tuple(linear.weight.shape)}")
    with torch.no_grad():
        linear.weight.copy_(weight)


def bits_and_group(setting: str) -> tuple[int, int | None]:
    """Read a setting such as ``4bit-g64`` or ``4bit-row`` as (4, 64) or (4, None)."""
    match = re.fullmatch(r"(\d)bit-(?:g(\d+)|row)", setting)
    if match is None:
        raise ValueError(f"unknown setting {setting!r}: expected e.g. '4bit-g64' or '4bit-row'")
    return int(match[1]), int(match[2]) if match[2] else None


class Measured:
    """Context manager that takes the wall-clock time and the peak resident set of its body."""

    seconds: float = 0.0
    peak_rss_bytes: int | None = None

    def __enter__(self) -> Measured:
        with contextlib.suppress(OSError):
            # Linux: forget the peak so far, so that the one read at the end is the body's own.
            Path("/proc/self/clear_refs").write_text("5")
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return
        if match := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            self.peak_rss_bytes = int(match[1]) * 1024
