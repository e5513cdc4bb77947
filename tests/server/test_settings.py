"""Flags, environment and file: which wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from spallm_serve.errors import UserError
from spallm_serve.server.settings import load_settings


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("base: from-file\nport: 1\nslots: 2\nhost_bytes: 3\n")
    monkeypatch.setenv("SPALLM_PORT", "10")
    monkeypatch.setenv("SPALLM_SLOTS", "20")
    found = load_settings({"slots": 200, "base": None}, file)
    assert (found.base, found.port, found.slots, found.host_bytes) == ("from-file", 10, 200, 3)
    assert load_settings({"base": "b"}, None).host_bytes == 2 * 2**30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: b\nports: 1\n", "ports"),
        ("base: b\nport: 70000\n", "port"),
        ("port: 1\n", "base"),
        ("base: b\nname: 'Acme/x'\n", "name"),
        ("- base\n", "KEY: VALUE"),
        ("base: [unclosed\n", "YAML"),
    ],
)
def test_what_a_file_may_not_say(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        load_settings({}, file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_settings({"base": "b"}, tmp_path / "none.yaml")


@pytest.mark.parametrize("secret", ["xyz", "ab" * 16])
def test_secrets_that_are_none(secret: str) -> None:
    with pytest.raises(UserError, match="cache_secret") as refused:
        load_settings({"base": "b", "cache_secret": secret}, None).secret_bytes()
    assert secret not in str(refused.value)


def test_a_secret_is_not_shown() -> None:
    found = load_settings({"base": "b", "cache_secret": "ab" * 32}, None)
    assert found.secret_bytes() == b"\xab" * 32
    assert "abab" not in repr(found)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("SPALLM_PINED_SLOTS", "SPALLM_PINNED_SLOTS"),
        ("SPALLM_DRAIN_SECOND", "SPALLM_DRAIN_SECONDS"),
    ],
)
def test_a_misspelt_variable_is_refused(
    variable: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UserError, match=f"{variable} .* {meant} meant"):
        load_settings({"base": "b"}, None)


def test_variables_of_others_are_none_of_its_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels', a client's, and what Kubernetes makes of a service of that name."""
    others = "KERNEL", "CPU_INTEGERS", "BATCH_INVARIANT", "ENDS_WITH_PARENT", "KEY", "SERVER"
    services = "SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP_ADDR"
    for name in others + services:
        monkeypatch.setenv(f"SPALLM_{name}", "tcp://10.0.0.1:8000")
    assert load_settings({"base": "b"}, None).base == "b"
