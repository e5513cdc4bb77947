"""An adapter: what fine-tuning adds to a base; its configuration, tensors and identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from spallm_serve.errors import UserError

ROWS = ".rows"
BLOCKS, BLOCK_INDEX = ".blocks", ".block_index"
LORA_PREFIX = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"

_FORMAT_VERSION: Literal[1] = 1
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Common(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = _FORMAT_VERSION
    base_digest: _Digest
    base_model_name_or_path: str = ""


class LutConfig(_Common):
    """``adapter_config.json`` of tables: ``<module>.tables``, full values, float16.

    ``[out, groups, 2**bits]``; or ``[n, groups, 2**bits]`` for the rows that int32
    ``<module>.rows [n]`` names, in ascending order. Modules and rows that are not there keep the
    base's. A trained normalisation has its ``<module>.weight`` and ``<module>.bias``, float32.
    """

    peft_type: Literal["SPALLM_LUT"] = "SPALLM_LUT"


class SmtConfig(_Common):
    """``adapter_config.json`` of sparse blocks, added to the base's weights.

    ``<module>.blocks`` float16 ``[m, l, l]`` and ``<module>.block_index`` int32 ``[m, 2]``, the row
    and column of each in units of l; a block beyond a ragged edge holds zeros there.

    Attributes:
        block_size: l.
    """

    peft_type: Literal["SPALLM_SMT"] = "SPALLM_SMT"
    block_size: int = Field(ge=1, le=4096)


class LoraConfig(BaseModel):
    """``adapter_config.json`` of a LoRA, as PEFT writes it, with the digest of its base.

    What PEFT knows beyond plain LoRA is refused, not ignored: it would change what is computed.

    Attributes:
        base_digest: of the compressed base it was trained on; None for one trained elsewhere.
        r, lora_alpha, use_rslora: rank and scale.
        fields: all of PEFT's, kept so that it can be written again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    peft_type: Literal["LORA"] = "LORA"
    base_digest: _Digest | None = None
    r: int = Field(ge=1, le=4096)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    use_rslora: bool = False
    fields: dict[str, Any] = Field(default_factory=dict, exclude=True)

    @property
    def scale(self) -> float:
        """What ``B A`` is multiplied by."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


AdapterConfig = LutConfig | SmtConfig | LoraConfig
_OWN_CONFIGS: TypeAdapter[LutConfig | SmtConfig] = TypeAdapter(
    Annotated[LutConfig | SmtConfig, Field(discriminator="peft_type")]
)
# Fields of PEFT's LoraConfig that must have one of these values, or be absent.
_PLAIN_LORA: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


@dataclass(frozen=True)
class Adapter:
    """A configuration and its tensors by name."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def modules(self, ending: str) -> list[str]:
        """The modules that have a tensor with this ending, in name order."""
        return sorted(name.removesuffix(ending) for name in self.tensors if name.endswith(ending))


def lora_modules(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """``lora_A [r, in]`` and ``lora_B [out, r]`` of a checked LoRA by the module's name in the
    model."""
    return {
        module.removeprefix(LORA_PREFIX): (
            adapter.tensors[module + LORA_A],
            adapter.tensors[module + LORA_B],
        )
        for module in adapter.modules(LORA_A)
    }


def adapter_digest(adapter: Adapter) -> str:
    """An adapter's identity: sha256 over the configuration that counts and all tensors.

    Names of bases and paths do not go in, the base's digest does.

    Returns:
        64 hexadecimal digits.
    """
    config = adapter.config.model_dump(mode="json", exclude={"base_model_name_or_path"})
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(adapter.tensors):
        tensor = adapter.tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_fields(config: AdapterConfig) -> dict[str, Any]:
    """What ``adapter_config.json`` holds."""
    if isinstance(config, LoraConfig):
        return config.fields | config.model_dump(mode="json")
    return config.model_dump(mode="json")


def parse_adapter_config(raw: object, where: str) -> AdapterConfig:
    """Validate the contents of an ``adapter_config.json``.

    Raises:
        UserError: not one of SPALLM_LUT, SPALLM_SMT and plain LORA, an unknown format version, or
            fields that are missing, unknown or out of range.
    """
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or kind not in ("SPALLM_LUT", "SPALLM_SMT", "LORA"):
        raise UserError(f"{where}: peft_type {kind!r}, expected SPALLM_LUT, SPALLM_SMT or LORA")
    try:
        if kind == "LORA":
            return _parse_lora(raw, where)
        if raw.get("format") != _FORMAT_VERSION:
            raise UserError(
                f"{where}: adapter format {raw.get('format')!r}, this release reads format "
                f"{_FORMAT_VERSION}; install a newer spallm-serve"
            )
        return _OWN_CONFIGS.validate_python(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{where}: {field}: {problem['msg']}") from error


def _parse_lora(raw: dict[str, Any], where: str) -> LoraConfig:
    for field, plain in _PLAIN_LORA.items():
        if field in raw and raw[field] not in plain:
            raise UserError(
                f"{where}: {field} is {raw[field]!r}; only plain LoRA can be used "
                f"(expected {plain[0]!r})"
            )
    own = {name: raw[name] for name in LoraConfig.model_fields if name in raw}
    return LoraConfig.model_validate(own | {"fields": raw})


_ConfigType = TypeVar("_ConfigType", LutConfig, SmtConfig, LoraConfig)


def expect_kind(adapter: Adapter, kind: type[_ConfigType], where: str) -> _ConfigType:
    """The adapter's configuration, of the wanted kind.

    Raises:
        UserError: it is another kind.
    """
    if not isinstance(adapter.config, kind):
        raise UserError(f"{where}: is a {adapter.config.peft_type} adapter")
    return adapter.config
