"""What ``spallm-adapter`` does once its options are understood."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from spallm_serve.adapter import Adapter, LutConfig, adapter_digest
from spallm_serve.adapter_files import read_adapter, write_adapter
from spallm_serve.adapters_store.base import check_fits, open_base
from spallm_serve.adapters_store.conversion import Conversion, base_tokens, convert, open_target
from spallm_serve.adapters_store.difference import compare
from spallm_serve.adapters_store.facts import AdapterFacts, Fact, adapter_facts, base_name
from spallm_serve.adapters_store.merge import merge, tensor_count
from spallm_serve.compressor.projection import Change, Projected
from spallm_serve.compressor.run_directory import check_output

_MIB = 1 << 20
_SHOWN_NAMES = 8


def inspect_adapter(directory: Path, *, as_json: bool) -> None:
    """Print what an adapter is.

    Raises:
        UserError: it is none, or damaged.
    """
    facts = adapter_facts(read_adapter(directory))
    if as_json:
        print(json.dumps(asdict(facts), indent=2))
        return
    console = _console()
    _print_summary(console, facts)
    table = _table("module", "shape", "dtype", "bytes", "")
    for module in facts.modules:
        shape = "×".join(str(length) for length in module.shape)
        note = "some rows" if module.details.get("all_rows") is False else ""
        table.add_row(printable(module.name), shape, module.dtype, f"{module.nbytes:,}", note)
    console.print(table)


def verify_adapter(directory: Path, base: str | None) -> None:
    """Check an adapter by itself, and against a base if there is one; print one line.

    Raises:
        UserError: what is wrong.
    """
    adapter = read_adapter(directory)
    kind, digest = adapter.config.peft_type, adapter_digest(adapter)
    said = f"OK: {directory} is a whole {kind} adapter, {digest[:12]}"
    if base is not None:
        with tempfile.TemporaryDirectory() as scratch:
            found = check_fits(adapter, open_base(base, Path(scratch) / "base"))
        if adapter.config.base_digest is None:
            said += f"; its layers are those of {base}, and it names no base"
        else:
            said += f", made for {base}, {found[:12]}"
    _console().print(printable(said), soft_wrap=True)


def merge_adapter(directory: Path, base_name: str, output: Path) -> None:
    """Write the base with the adapter in its weights.

    Raises:
        UserError: they do not go together, or the output cannot be written.
    """
    adapter = read_adapter(directory)
    console = _console()
    with tempfile.TemporaryDirectory() as scratch:
        base = open_base(base_name, Path(scratch) / "base")
        check_fits(adapter, base)
        if base.sketch is not None and not isinstance(adapter.config, LutConfig):
            console.print(
                f"{printable(base_name)} is compressed, and codes have no room for what the "
                "adapter adds: the merged model is dense, in bfloat16, without quantization_config",
                soft_wrap=True,
            )
        with _progress("tensors") as step:
            total = tensor_count(adapter, base)
            written = merge(adapter, base, output, lambda done: step(done, total))
    console.print(f"[b]{printable(str(output))}[/b]: {written / _MIB:,.1f} MiB", soft_wrap=True)


def diff_adapters(first: Path, second: Path) -> None:
    """Print how two adapters differ.

    Raises:
        UserError: one of them is none, or damaged.
    """
    a, b = read_adapter(first), read_adapter(second)
    console = _console()
    facts = _table("", "A", "B")
    for title, value in (
        ("directory", (str(first), str(second))),
        ("kind", (a.config.peft_type, b.config.peft_type)),
        ("base", (base_name(a), base_name(b))),
        ("base digest", (_short(a.config.base_digest), _short(b.config.base_digest))),
        ("digest", (_short(adapter_digest(a)), _short(adapter_digest(b)))),
    ):
        facts.add_row(title, *(printable(each) for each in value))
    console.print(facts)
    if a.config.peft_type != b.config.peft_type:
        console.print("of two kinds: there are no values to compare")
        return
    if a.config.base_digest != b.config.base_digest:
        console.print("[yellow]made for two bases: equal values do not mean the same change[/]")
    _print_difference(console, a, b)


def convert_fine_tune(
    source: str,
    base_name: str,
    output: Path,
    original: str | None,
    text: tuple[str, int, int] | None,
) -> None:
    """Move a fine-tune onto the codes of a base, and print what was lost.

    Args:
        source: a LoRA's directory or a model.
        base_name: the compressed base.
        output: the adapter's directory.
        original: what the base was compressed from, or None.
        text: calibration text, windows and their tokens; None weighs all weights alike.

    Raises:
        UserError: they do not go together, or the output holds something or cannot be written.
    """
    check_output(output)
    console = _console()
    with tempfile.TemporaryDirectory() as scratch, _progress("layers") as step:
        base = open_target(base_name, Path(scratch) / "base")
        tokens = None if text is None else base_tokens(base, *text)
        found = convert(source, base, original, tokens, Path(scratch), step)
    write_adapter(found.adapter, output)
    _print_losses(console, found, under_text=tokens is not None)
    digest = adapter_digest(found.adapter)
    console.print(
        f"[b]{printable(str(output))}[/b]: {found.adapter.nbytes / 1e6:.2f} MB, {digest[:12]}",
        soft_wrap=True,
    )


def _print_summary(console: Console, facts: AdapterFacts) -> None:
    table = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    table.add_row("kind", facts.kind)
    table.add_row("base", printable(facts.base))
    table.add_row("base digest", facts.base_digest or "none named")
    table.add_row("adapter digest", facts.digest)
    table.add_row("bytes", f"{facts.nbytes:,}")
    table.add_row("modules", f"{len(facts.modules):,}")
    for name, value in facts.summary.items():
        table.add_row(_words(name), _fact(value))
    console.print(table)


def _print_difference(console: Console, a: Adapter, b: Adapter) -> None:
    found = compare(a, b)
    for names, title in ((found.only_a, "only in A"), (found.only_b, "only in B")):
        if names:
            console.print(f"{title}: {_names(names)}", soft_wrap=True)
    table = _table("module", "largest", "rms", "")
    for module in found.modules:
        values = ["-" if math.isnan(x) else f"{x:.3e}" for x in (module.largest, module.rms)]
        table.add_row(printable(module.name), *values, module.note)
    console.print(table)


def _print_losses(console: Console, found: Conversion, *, under_text: bool) -> None:
    kinds: defaultdict[str, dict[str, Projected]] = defaultdict(dict)
    for module, layer in found.layers.items():
        kinds[_kind(module)][module] = layer
    table = _table("layers", "count", "change lost", "worst", "in")
    for kind, layers in kinds.items():
        worst = max(layers, key=lambda module: layers[module].change.relative_error)
        table.add_row(
            printable(kind),
            f"{len(layers):,}",
            _lost(layers),
            f"{layers[worst].change.relative_error:.1%}",
            printable(worst.removesuffix(kind).rstrip(".")),
        )
    table.add_row("all", f"{len(found.layers):,}", _lost(found.layers), "", "", style="bold")
    console.print(table)
    measure = "outputs on the calibration text" if under_text else "weights"
    numbers = max(layer.tables.shape[1] * layer.tables.shape[2] for layer in found.layers.values())
    console.print(
        f"Lost: the part of the change that the tables do not make, as a share of it, in "
        f"{measure}. Tables hold at most 2^bits × groups numbers a row, here {numbers}, so a "
        "LoRA's change fits them only partly.",
        soft_wrap=True,
    )
    if found.left_behind:
        console.print(
            "[yellow]warning:[/] changed, but tables have no place for it: "
            + _names(found.left_behind),
            soft_wrap=True,
        )


def _lost(layers: dict[str, Projected]) -> str:
    total = sum((layer.change for layer in layers.values()), Change(0.0, 0.0))
    return f"{total.relative_error:.1%}"


def _kind(module: str) -> str:
    """``self_attn.q_proj`` of ``model.layers.0.self_attn.q_proj``: what follows the last number."""
    return re.sub(r"^.*\.\d+\.", "", module)


def printable(text: str) -> str:
    """A name out of an untrusted file for the terminal: no control codes, no markup."""
    return escape("".join(c if c.isprintable() else "?" for c in text))


def _names(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    shown = ", ".join(printable(name) for name in names[:_SHOWN_NAMES])
    return shown + (f" and {more:,} more" if more > 0 else "")


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none named"


def _fact(value: Fact) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _table(first: str, *others: str) -> Table:
    """Names and digests are read off it, so nothing is cut; the first column is not even folded."""
    folded = [Column(title, overflow="fold") for title in others]
    return Table(Column(first, no_wrap=True), *folded, box=box.SIMPLE, pad_edge=False)


def _console() -> Console:
    return Console(highlight=False)


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
