"""The upload validator: nothing about the two files is believed before it was looked at.

:func:`check_upload` does it in this process; the store runs it in another one
(:mod:`spallm_serve.adapters_store.sandbox`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spallm_serve.adapter import (
    LORA_A,
    LORA_PREFIX,
    Adapter,
    AdapterConfig,
    LoraConfig,
    adapter_digest,
    config_fields,
    parse_adapter_config,
)
from spallm_serve.adapter_files import CONFIG_FILE
from spallm_serve.adapter_structure import check_structure
from spallm_serve.adapters_store.failures import RejectedError
from spallm_serve.adapters_store.fit import check_fit
from spallm_serve.adapters_store.manifest import BaseManifest
from spallm_serve.adapters_store.tensor_header import TensorHeader, read_header
from spallm_serve.adapters_store.untrusted_json import parse_json
from spallm_serve.errors import UserError
from spallm_serve.precision import first_not_finite

_CONFIG_DEPTH = 8
# Fields that PEFT writes and that change nothing here. What is not known is refused: the next
# release of PEFT may give it a meaning.
_HARMLESS = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "peft_version",
        "qalora_group_size",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    ]
)
_LONGEST_MESSAGE = 500


class UploadLimits(BaseModel):
    """Sizes that no upload may exceed.

    Attributes:
        config_bytes, tensor_bytes: of the two files.
        max_rank: of LoRAs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config_bytes: int = Field(default=64 << 10, ge=1)
    tensor_bytes: int = Field(default=2 << 30, ge=1)
    max_rank: int = Field(default=256, ge=1)


class Checked(BaseModel):
    """An upload that is an adapter of the base.

    Attributes:
        digest: its identity.
        kind: ``SPALLM_LUT``, ``SPALLM_SMT`` or ``LORA``.
        base_digest: of the base.
        config: its ``adapter_config.json``, written anew from what was understood of it, so that no
            word of the uploader's goes any further.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    kind: str = Field(pattern=r"^(SPALLM_LUT|SPALLM_SMT|LORA)$")
    base_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    config: str


def check_upload(
    config_path: Path, tensor_path: Path, manifest: BaseManifest, limits: UploadLimits
) -> Checked:
    """Check an upload against a base.

    Args:
        config_path, tensor_path: the two files; only read.
        manifest: of the base.
        limits: on sizes.

    Raises:
        RejectedError: what is wrong, in words that its author can act on.
    """
    try:
        config = _read_config(config_path, limits.config_bytes)
        _check_base(config, manifest)
        size = tensor_path.stat().st_size
        if size > limits.tensor_bytes:
            raise RejectedError(
                f"the tensors have {size:,} bytes; this server takes {limits.tensor_bytes:,}"
            )
        tensors = _map_tensors(tensor_path, read_header(tensor_path))
        adapter = Adapter(config, tensors)
        check_structure(adapter)
        check_fit(adapter, manifest, limits.max_rank)
        name = first_not_finite(tensors)
        if name is not None:
            raise RejectedError(f"{name} holds NaN or Inf; was training unstable?")
    except UserError as error:
        raise RejectedError(_one_line(str(error))) from error
    return Checked(
        digest=adapter_digest(adapter),
        kind=config.peft_type,
        base_digest=manifest.base_digest,
        config=json.dumps(_canonical(adapter), indent=2, sort_keys=True) + "\n",
    )


def _one_line(text: str) -> str:
    """A message that may quote an upload, safe for terminals and logs."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in text[:_LONGEST_MESSAGE])
    return shown + ("..." if len(text) > _LONGEST_MESSAGE else "")


def _read_config(path: Path, most: int) -> AdapterConfig:
    size = path.stat().st_size
    if size > most:
        raise RejectedError(f"{CONFIG_FILE} has {size:,} bytes; no adapter's has over {most:,}")
    raw = parse_json(path.read_bytes(), CONFIG_FILE, depth=_CONFIG_DEPTH)
    config = parse_adapter_config(raw, CONFIG_FILE)
    if isinstance(config, LoraConfig):
        unknown = sorted(set(raw) - _HARMLESS - (set(LoraConfig.model_fields) - {"fields"}))
        if unknown:
            raise RejectedError(
                f"{CONFIG_FILE}: {unknown[0][:100]!r} is no field of a plain LoRA; leave it out if "
                "it changes nothing"
            )
    return config


def _check_base(config: AdapterConfig, manifest: BaseManifest) -> None:
    # A LoRA of another trainer names no base; its shapes must fit all the same.
    if config.base_digest not in (None, manifest.base_digest):
        raise RejectedError(
            f"made for the base {config.base_digest}, served is {manifest.base_digest}: an adapter "
            "only fits the codes it was trained on; train it on this base"
        )


def _map_tensors(path: Path, headers: list[TensorHeader]) -> dict[str, Tensor]:
    """Tensors that lie in the file and not in memory, by name.

    safetensors reads the header again by itself; it must find what was found here.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if sorted(file.keys()) != sorted(header.name for header in headers):
                raise RejectedError("the tensors' header can be read in two ways")
            tensors = {header.name: file.get_tensor(header.name) for header in headers}
    except SafetensorError as error:
        raise RejectedError(f"the tensors are no safetensors file ({error})") from error
    for header in headers:
        if tuple(tensors[header.name].shape) != header.shape:
            raise RejectedError("the tensors' header can be read in two ways")
    return tensors


def _canonical(adapter: Adapter) -> dict[str, Any]:
    """The configuration as this project would write it, without free text."""
    config = adapter.config
    if not isinstance(config, LoraConfig):
        return config_fields(config.model_copy(update={"base_model_name_or_path": ""}))
    # What stock PEFT and vLLM need beside rank and scale: the layers, in full.
    modules = [name.removeprefix(LORA_PREFIX) for name in adapter.modules(LORA_A)]
    plain = {"bias": "none", "target_modules": modules, "task_type": "CAUSAL_LM"}
    return config.model_dump(mode="json") | plain
