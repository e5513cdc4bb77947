"""Flags of vLLM's, as vLLM itself would read them."""

from __future__ import annotations

from collections.abc import Iterable


def found_flag(flags: Iterable[str], wanted: str) -> str | None:
    """How a flag is written among others; None if it is not there.

    vLLM takes underscores for dashes, values after ``=``, and beginnings of names; one that begins
    several counts as all of them.

    Args:
        flags: as given on a command line, with their values.
        wanted: for example ``--dtype``.
    """
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        begins = name.startswith("--") and name != "--" and wanted.startswith(name)
        if begins or name == wanted:
            return name
    return None
