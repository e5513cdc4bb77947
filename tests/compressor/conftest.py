"""What tests of the compressor share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spallm_serve.compressor import native, publish


@pytest.fixture(params=["native", "torch"], scope="module")
def loops(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on the compiled inner loops, and on those in torch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "usable_for", lambda tensor: False)
            patch.setattr(native, "multiplies", lambda activations: False)
        elif native.library() is None:
            pytest.skip("the compressor's native loops were not built")
        yield request.param


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is compressed: the plots take longer than a tiny model does."""
    monkeypatch.setattr(publish, "write_report", lambda record, path: None)
