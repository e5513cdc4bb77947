"""Settings in a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from spallm_serve.errors import UserError

_MAX_CONFIG_BYTES = 1 << 20


def read_config(path: Path) -> dict[str, Any]:
    """The settings that a YAML file gives, not yet validated.

    Raises:
        UserError: no such file, not YAML, or no mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise UserError(f"{path}: larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected settings as KEY: VALUE")
    return raw
