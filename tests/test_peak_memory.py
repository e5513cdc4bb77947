"""A process's largest memory. Its processes import this file, which is why it imports little."""

from __future__ import annotations

import pytest

from spallm_serve.benchmarks.peak_memory import peak_rss


def test_peak_memory_is_that_of_the_whole_process() -> None:
    small, large = (peak_rss(hold_bytes, count=count) for count in (1, 200_000_000))
    assert 150_000_000 < large - small < 250_000_000
    with pytest.raises(RuntimeError, match="hold_bytes"):
        peak_rss(hold_bytes, size=1)


def hold_bytes(count: int) -> None:
    bytearray(b"a") * count
