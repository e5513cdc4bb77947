"""Everything a compression run can be told, checked once at its border."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spallm_serve.checkpoint import Bits
from spallm_serve.errors import UserError


class CompressSettings(BaseModel):
    """Settings of one run; the same settings, model and calibration text give the same bytes.

    Attributes:
        bits: of every layer that ``bits_for`` and ``target_bits`` leave alone.
        groups_per_row: column groups with a table each.
        calibration: a .txt or .jsonl file, ``hf:DATASET``, or ``self``.
        samples, seqlen: calibration windows and their tokens.
        weight_exponent: p of the Lloyd weights ``U_jj ** -p``.
        damping: share of the mean diagonal added to the Hessian.
        refit: least squares and coordinate descent after rounding.
        descent_cycles: passes of that coordinate descent.
        drift_correction: aim at the original's outputs on the compressed model's inputs.
        refine_steps: steps of distillation from the original model.
        estimator_rank: of the SVD estimators; 0 writes none.
        target_bits: average bits per weight, tables counted, to choose bits per layer for.
        bits_for: (GLOB, bits) pairs; the last match wins.
        skip: GLOBs of linears to leave as they are.
        embeddings: bits for the embedding and the output head; None leaves them.
        device: where the arithmetic runs.
        seed: of sampling and of the randomised SVD.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits = 4
    groups_per_row: int = Field(1, ge=1, le=64)
    calibration: str = "self"
    samples: int = Field(64, ge=1)
    seqlen: int = Field(512, ge=8)
    weight_exponent: float = Field(2.0, ge=0, le=16)
    damping: float = Field(0.1, ge=0, le=10)
    refit: bool = True
    descent_cycles: int = Field(2, ge=0, le=64)
    drift_correction: bool = True
    refine_steps: int = Field(0, ge=0)
    estimator_rank: int = Field(8, ge=0, le=1024)
    target_bits: float | None = Field(None, gt=2, le=5)
    bits_for: tuple[tuple[str, Bits], ...] = ()
    skip: tuple[str, ...] = ()
    embeddings: Literal[2, 3, 4] | None = None
    device: str = "cpu"
    seed: int = 0


def parse_settings(raw: dict[str, object]) -> CompressSettings:
    """Settings from options.

    Raises:
        UserError: names the option, what was given and what was expected.
    """
    try:
        return CompressSettings.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise UserError(f"--{option} {problem['input']!r}: {problem['msg']}") from error
