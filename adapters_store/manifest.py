"""What an adapter must match: the layers of a base, without its weights.

Apart from what makes it (:mod:`spallm_serve.adapters_store.survey_base`), so that the process
that checks uploads need not import transformers.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LinearShape(BaseModel):
    """A linear layer.

    Attributes:
        rows, columns: of its weight, ``[out, in]``.
        bits, groups: how it is compressed; None for a dense one.
        in_block: whether it is part of a decoder block.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    bits: int | None = None
    groups: int | None = None
    in_block: bool


class BaseManifest(BaseModel):
    """All of a base that an adapter can change.

    Attributes:
        base_digest: the base's identity.
        linears: by module name.
        norms: shapes of the normalisations' parameters, by parameter name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    linears: dict[str, LinearShape]
    norms: dict[str, tuple[int, ...]]
