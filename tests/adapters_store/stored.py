"""A store of a base of two layers, and adapters for it; no model is needed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from spallm_serve.adapter import LORA_A, LORA_B, LORA_PREFIX
from spallm_serve.adapters_store.location import Location
from spallm_serve.adapters_store.manifest import BaseManifest, LinearShape
from spallm_serve.adapters_store.records import Principal, Scope
from spallm_serve.adapters_store.sandbox import Sandbox
from spallm_serve.adapters_store.store import AdapterStore, ServedBase
from spallm_serve.adapters_store.validate import Checked, check_upload

BASE_DIGEST = "ba5e" * 16
BASE_NAME = "tiny-base"
LAYER, HEAD, NORM = "model.layers.0.mlp.up_proj", "lm_head", "model.norm.weight"
MANIFEST = BaseManifest(
    base_digest=BASE_DIGEST,
    linears={
        LAYER: LinearShape(rows=6, columns=10, bits=2, groups=2, in_block=True),
        HEAD: LinearShape(rows=5, columns=6, in_block=False),
    },
    norms={NORM: (6,)},
)
ADMIN = Principal(tenant="admin", scopes=frozenset({Scope.ADMIN}), key_id="test")


class DirectSandbox(Sandbox):
    """Checks in this process: the same check, without the second that a process takes."""

    def check(self, config_path: Path, tensor_path: Path) -> Checked:
        return check_upload(config_path, tensor_path, self.manifest, self.upload)


@dataclass(frozen=True)
class Upload:
    """The two files of an upload, as bytes."""

    config: bytes
    tensors: bytes

    def write(self, directory: Path) -> tuple[Path, Path]:
        directory.mkdir(parents=True, exist_ok=True)
        paths = directory / "config", directory / "tensors"
        paths[0].write_bytes(self.config)
        paths[1].write_bytes(self.tensors)
        return paths


def lut(seed: int = 0) -> Upload:
    random = torch.Generator().manual_seed(seed)
    tensors = {
        LAYER + ".tables": torch.randn(2, 2, 4, generator=random).half(),
        LAYER + ".rows": torch.tensor([1, 4], dtype=torch.int32),
        NORM: torch.randn(6, generator=random),
    }
    fields = {"peft_type": "SPALLM_LUT", "format": 1, "base_digest": BASE_DIGEST}
    return Upload(json.dumps(fields).encode(), save(tensors))


def smt(seed: int = 0) -> Upload:
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randn(2, 4, 4, generator=random)
    blocks[1, 2:] = 0  # the second reaches beyond the edges of 6 x 10
    blocks[1, :, 2:] = 0
    tensors = {
        LAYER + ".blocks": blocks.half(),
        LAYER + ".block_index": torch.tensor([[0, 1], [1, 2]], dtype=torch.int32),
    }
    fields = {"peft_type": "SPALLM_SMT", "format": 1, "base_digest": BASE_DIGEST, "block_size": 4}
    return Upload(json.dumps(fields).encode(), save(tensors))


def lora(seed: int = 0) -> Upload:
    random = torch.Generator().manual_seed(seed)
    tensors = {
        LORA_PREFIX + HEAD + LORA_A: torch.randn(2, 6, generator=random),
        LORA_PREFIX + HEAD + LORA_B: torch.randn(5, 2, generator=random).bfloat16(),
    }
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]}
    return Upload(json.dumps(fields).encode(), save(tensors))


KINDS = {"lut": lut, "smt": smt, "lora": lora}


def location(directory: Path, database: str | None = None) -> Location:
    return Location(
        blobs=str(directory / "blobs"),
        database=database or f"sqlite:///{directory / 'catalogue.db'}",
        folders=directory / "adapters",
    )


@contextlib.contextmanager
def opened(where: Location, manifest: BaseManifest = MANIFEST) -> Iterator[AdapterStore]:
    with AdapterStore(where, ServedBase(BASE_NAME, DirectSandbox(manifest))) as store:
        yield store


def tenant(store: AdapterStore, name: str, *, may_use_base: bool = False) -> Principal:
    """A new tenant's key for its adapters."""
    store.tenants.create(ADMIN, name, may_use_base=may_use_base)
    scopes = frozenset({Scope.INFERENCE, Scope.ADAPTERS})
    return Principal(tenant=name, scopes=scopes, key_id=f"of-{name}")


def blob_count(directory: Path) -> int:
    """Files below a store's blobs, finished or not."""
    return sum(path.is_file() for path in (directory / "blobs").rglob("*"))
