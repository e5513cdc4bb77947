"""Which backend serves, and why not another."""

from __future__ import annotations

import logging

import pytest
import torch

from spallm_serve.kernels import choice, explain
from spallm_serve.kernels.choice import FORCE_VARIABLE
from spallm_serve.kernels.cpu import backend as cpu_backend
from spallm_serve.kernels.cpu import library as native
from spallm_serve.kernels.cpu.library import library
from spallm_serve.kernels.native import NativeLibraryError
from tests.kernels.cases import (
    assert_right,
    make_case,
    prepared,
)


def test_without_a_native_library_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> int:
        raise NativeLibraryError("not built, says the test")

    monkeypatch.delenv(FORCE_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu_backend, "best_level", absent)
    assert str(explain("cpu")) == (
        "reference; not cpu: not built, says the test; not triton: the tensors are on cpu"
    )
    assert_right(make_case(4))


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale build lacks a function or two; it must not be called on trust."""
    try:
        library()
    except NativeLibraryError as error:
        pytest.skip(str(error))
    monkeypatch.setitem(native._FUNCTIONS, "spallm_of_tomorrow", (None, ()))
    library.cache_clear()
    try:
        with pytest.raises(NativeLibraryError, match=r"spallm_of_tomorrow.*install this package"):
            library()
    finally:
        library.cache_clear()


def test_the_choice_is_explained_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert explain("cuda", torch.float64).backend == "reference"
    assert "cuda" in explain("cuda", torch.float64).refused["cpu"]
    assert "float64" in str(explain("cpu", torch.float64))
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert str(explain("cpu")) == "reference (by SPALLM_KERNEL)"
    choice._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            prepared(make_case(2))
    assert [record.getMessage() for record in caplog.records] == [
        "lut_linear runs on reference (by SPALLM_KERNEL)"
    ]
    monkeypatch.setenv(FORCE_VARIABLE, "cpu-scalar")
    with pytest.raises(ValueError, match="cpu-scalar cannot serve"):
        explain("cuda")
    monkeypatch.setenv(FORCE_VARIABLE, "cuda-magic")
    with pytest.raises(ValueError, match=r"cuda-magic.*expected one of cpu, triton, reference"):
        explain("cpu")


def test_explains_why_cuda_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("it does here")
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert explain("cuda").refused["triton"] == "torch sees no GPU"
