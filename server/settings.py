"""What the server is told: flags, environment and a file, one schema."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from spallm_serve.config_file import read_config
from spallm_serve.errors import UserError
from spallm_serve.server.salt import SECRET_BYTES


class ServerSettings(BaseSettings):
    """Settings of a server; each is a flag, ``SPALLM_NAME`` in the environment, or a key of a YAML
    file, the first of them that is given."""

    model_config = SettingsConfigDict(env_prefix="SPALLM_", extra="forbid", frozen=True)
    in_file: ClassVar[dict[str, Any]] = {}

    base: str = Field(description="what spallm-compress made")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on")
    name: str = Field(
        default="base", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="the base as a model"
    )
    store: str | None = Field(
        default=None,
        description="folder of the adapter store, or the URL of a bucket; as for spallm-admin",
    )
    database: str | None = Field(
        default=None, description="catalogue, a URL of SQLAlchemy; SQLite in the folder by default"
    )

    slots: int = Field(
        default=8, ge=1, le=1024, description="adapters that a step can mix, beside the base"
    )
    pinned_slots: int = Field(
        default=0, ge=0, le=1024, description="slots beside those, for adapters that are pinned"
    )
    host_bytes: int = Field(
        default=2 * 2**30, ge=0, description="memory for adapters that are in no slot"
    )

    insecure_no_auth: bool = Field(
        default=False, description="no keys: everybody is one tenant that may do everything"
    )
    cache_secret: SecretStr | None = Field(
        default=None,
        description="hex, of the tenants' keys into the prefix cache; made and kept in the folder "
        "by default, to be the same for all replicas",
    )
    rate_storage: str = Field(
        default="memory://",
        description="counts of requests and tokens; redis://... for replicas, which also share "
        "the requests at a time",
    )
    body_bytes: int = Field(
        default=4 * 2**20, ge=1024, description="of a request to a model, at most"
    )
    upload_bytes: int = Field(
        default=1 * 2**30, ge=1024, description="of an adapter that is uploaded, at most"
    )
    upload_seconds: float = Field(
        default=600, gt=0, description="until an upload has to be complete"
    )
    uploads: int = Field(default=8, ge=1, description="at a time; half of them may be one tenant's")
    max_choices: int = Field(default=8, ge=1, description="sequences of one request")
    max_tokens: int = Field(default=8192, ge=1, description="generated for each of them")

    ready_seconds: float = Field(
        default=10, gt=0, description="in which one token has to be decoded for /readyz"
    )
    drain_seconds: int = Field(
        default=30, ge=0, description="that running requests have after SIGTERM"
    )
    access_log: bool = Field(
        default=True, description="a line of JSON for each request, on standard error"
    )
    metrics_tenants: int = Field(default=100, ge=0, description="tenants told apart in the metrics")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, cls.in_file)

    def secret_bytes(self) -> bytes | None:
        """The given cache secret.

        Raises:
            UserError: not hex, or too short.
        """
        if self.cache_secret is None:
            return None
        try:
            secret = bytes.fromhex(self.cache_secret.get_secret_value())
        except ValueError as error:
            raise UserError("cache_secret: expected hexadecimal digits") from error
        if len(secret) < SECRET_BYTES:
            raise UserError(f"cache_secret: {len(secret)} bytes, expected {SECRET_BYTES} or more")
        return secret


def load_settings(flags: dict[str, Any], file: Path | None) -> ServerSettings:
    """Gather the settings.

    Args:
        flags: those that were given; None stands for one that was not.
        file: YAML, or None.

    Raises:
        UserError: one that is missing, unknown, misspelt or out of range, or a file that cannot be
            read.
    """
    _refuse_misspelt_variables()

    class Gathered(ServerSettings):
        in_file = read_config(file) if file is not None else {}

    try:
        return Gathered(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "settings"
        raise UserError(f"{field}: {problem['msg']} (given: {problem['input']!r})") from error


def _refuse_misspelt_variables() -> None:
    """Others may begin like ours: Kubernetes makes variables of the names of services."""
    prefix = ServerSettings.model_config["env_prefix"]
    known = [prefix + name.upper() for name in ServerSettings.model_fields]
    for variable in os.environ:
        if variable.startswith(prefix) and variable not in known:
            meant = get_close_matches(
                variable.removeprefix(prefix).lower(), ServerSettings.model_fields, 1, 0.8
            )
            if meant:
                raise UserError(
                    f"{variable} in the environment is no setting; "
                    f"is {prefix}{meant[0].upper()} meant?"
                )
