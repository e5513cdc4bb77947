"""No malformed upload gets in, each is told why, and the check never ends otherwise."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load, save
from torch import Tensor

from spallm_serve.adapter import adapter_digest
from spallm_serve.adapter_files import CONFIG_FILE, TENSOR_FILE, read_adapter
from spallm_serve.adapters_store.base import check_fits, open_base
from spallm_serve.adapters_store.failures import RejectedError
from spallm_serve.adapters_store.manifest import BaseManifest
from spallm_serve.adapters_store.sandbox import Sandbox, SandboxLimits
from spallm_serve.adapters_store.store import AdapterStore, ServedBase
from spallm_serve.adapters_store.survey_base import base_manifest
from spallm_serve.adapters_store.validate import Checked, UploadLimits, check_upload
from spallm_serve.errors import UserError
from tests.adapters_store.made import MAKERS, saved
from tests.adapters_store.malformed import flipped_uploads, malformed_uploads, pack, unpack
from tests.adapters_store.stored import (
    ADMIN,
    HEAD,
    KINDS,
    LAYER,
    MANIFEST,
    NORM,
    Upload,
    blob_count,
    location,
    lora,
    lut,
    opened,
    smt,
    tenant,
)


def check(upload: Upload, where: Path, limits: UploadLimits | None = None) -> Checked:
    return check_upload(*upload.write(where), MANIFEST, limits or UploadLimits())


@pytest.fixture(scope="module")
def shared_store(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[AdapterStore, Path]]:
    directory = tmp_path_factory.mktemp("store")
    with opened(location(directory)) as store:
        tenant(store, "acme")
        yield store, directory


@settings(max_examples=400, deadline=None)
@given(upload=malformed_uploads())
def test_malformed_uploads_are_refused_and_leave_nothing(
    upload: Upload, shared_store: tuple[AdapterStore, Path]
) -> None:
    store, directory = shared_store
    with pytest.raises(RejectedError) as caught:
        store.put(ADMIN, "acme", "support", *upload.write(directory / "upload"))
    said = str(caught.value)
    assert said.isprintable() and 10 < len(said) < 600 and str(directory) not in said
    assert blob_count(directory) == 0
    assert store.adapters.list_visible("acme") == []
    assert [entry.action for entry in store.audit.entries(ADMIN)] == ["tenant.create"]


@settings(max_examples=200, deadline=None)
@given(upload=flipped_uploads())
def test_what_is_let_in_is_what_was_understood(upload: Upload) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        try:
            checked = check(upload, directory / "upload")
        except RejectedError:
            return
        (directory / CONFIG_FILE).write_text(checked.config)
        (directory / TENSOR_FILE).write_bytes(upload.tensors)
        assert adapter_digest(read_adapter(directory)) == checked.digest


@pytest.mark.parametrize("kind", KINDS)
def test_good_uploads(kind: str, tmp_path: Path) -> None:
    upload = KINDS[kind]()
    checked = check(upload, tmp_path)
    # Names of bases and files' own order do not make another adapter.
    fields = json.loads(upload.config) | {"base_model_name_or_path": "/home/me/secret"}
    again = check(Upload(json.dumps(fields).encode(), upload.tensors), tmp_path)
    assert again == checked and "secret" not in checked.config


def test_no_word_of_the_uploaders_goes_further(tmp_path: Path) -> None:
    fields = json.loads(lora().config) | {
        "target_modules": "(a+)+$",
        "auto_mapping": {"parent_library": "os", "base_model_class": "system"},
        "revision": "main",
    }
    checked = check(Upload(json.dumps(fields).encode(), lora().tensors), tmp_path)
    assert json.loads(checked.config) == {
        "peft_type": "LORA",
        "base_digest": None,
        "r": 2,
        "lora_alpha": 4.0,
        "use_rslora": False,
        "bias": "none",
        "target_modules": [HEAD],
        "task_type": "CAUSAL_LM",
    }


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (lut, {LAYER + ".tables": torch.zeros(2, 2, 8, dtype=torch.half)}, r"expected \[2, 2, 4\]"),
        (lut, {LAYER + ".tables": torch.zeros(2, 2, 4)}, "expected float16"),
        (lut, {LAYER + ".rows": torch.tensor([1, 6], dtype=torch.int32)}, "expected 0 to 5, got 6"),
        (lut, {LAYER + ".rows": torch.tensor([4, 1], dtype=torch.int32)}, "ascending"),
        (lut, {HEAD + ".tables": torch.zeros(5, 1, 4, dtype=torch.half)}, "no such compressed"),
        (lut, {NORM: torch.zeros(5)}, r"expected \[6\], got \[5\]"),
        (lut, {"model.other.weight": torch.zeros(6)}, "normalisation of the base"),
        (lut, {NORM: torch.tensor([1, 2, 3, 4, 5, torch.inf])}, "NaN or Inf"),
        (
            smt,
            {LAYER + ".block_index": torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)},
            r"block \(2, 0\) is outside of \[6, 10\]",
        ),
        (
            smt,
            {LAYER + ".block_index": torch.tensor([[1, 2], [1, 2]], dtype=torch.int32)},
            "given twice",
        ),
        (
            smt,
            {LAYER + ".blocks": torch.ones(2, 4, 4, dtype=torch.half)},
            r"block \(1, 2\) has values beyond",
        ),
    ],
)
def test_what_does_not_fit(
    make: Callable[[], Upload], changes: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    upload = make()
    tensors = save(load(upload.tensors) | changes)
    with pytest.raises(RejectedError, match=said):
        check(Upload(upload.config, tensors), tmp_path)


def test_blocks_only_in_decoder_blocks(tmp_path: Path) -> None:
    tensors = {key.replace(LAYER, HEAD): value for key, value in load(smt().tensors).items()}
    with pytest.raises(RejectedError, match="no such layer in its blocks"):
        check(Upload(smt().config, save(tensors)), tmp_path)


def test_caps(tmp_path: Path) -> None:
    upload = lora()
    with pytest.raises(RejectedError, match="up to rank 1"):
        check(upload, tmp_path, UploadLimits(max_rank=1))
    with pytest.raises(RejectedError, match="this server takes 100"):
        check(upload, tmp_path, UploadLimits(tensor_bytes=100))
    with pytest.raises(RejectedError, match="no adapter's has over 10"):
        check(upload, tmp_path, UploadLimits(config_bytes=10))
    header, data = unpack(upload.tensors)
    padded = json.dumps(header) + " " * (4 << 20)
    with pytest.raises(RejectedError, match="no adapter needs over"):
        check(Upload(upload.config, pack(padded, data)), tmp_path)
    many = {
        f"t{number}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
        for number in range((1 << 14) + 1)
    }
    with pytest.raises(RejectedError, match="no adapter has over"):
        check(Upload(upload.config, pack(many, b"")), tmp_path)


def test_another_base(tmp_path: Path) -> None:
    fields = json.loads(lut().config) | {"base_digest": "0" * 64}
    with pytest.raises(RejectedError, match="train it on this base") as caught:
        check(Upload(json.dumps(fields).encode(), lut().tensors), tmp_path)
    assert "0" * 64 in str(caught.value) and MANIFEST.base_digest in str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_a_manifest_says_what_the_model_says(
    architecture: str, bases: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """Against the model's own skeleton, which the other checks insert adapters into."""
    directory = bases[architecture]["sketched"]
    base = open_base(str(directory), tmp_path / "scratch")
    manifest = base_manifest(base)
    strangers = bases["gpt2" if architecture != "gpt2" else "llama"]["sketched"]
    for kind in MAKERS:
        for number, source in enumerate((directory, strangers)):
            folder = saved(kind, source, tmp_path / f"{kind}{number}")
            fields = json.loads((folder / CONFIG_FILE).read_text())
            if fields.get("base_digest"):
                fields["base_digest"] = manifest.base_digest
                (folder / CONFIG_FILE).write_text(json.dumps(fields))
            assert verdict(folder, manifest) == (number == 0)
            adapter = read_adapter(folder)
            if number == 0:
                assert check_fits(adapter, base) == manifest.base_digest
            else:
                with pytest.raises(UserError):
                    check_fits(adapter, base)


def verdict(folder: Path, manifest: BaseManifest) -> bool:
    try:
        check_upload(folder / CONFIG_FILE, folder / TENSOR_FILE, manifest, UploadLimits())
    except RejectedError:
        return False
    return True


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    found = Sandbox(MANIFEST)
    yield found
    found.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_process_says_the_same(kind: str, sandbox: Sandbox, tmp_path: Path) -> None:
    paths = KINDS[kind]().write(tmp_path)
    assert sandbox.check(*paths) == check_upload(*paths, MANIFEST, UploadLimits())


@settings(max_examples=4, deadline=None)
@given(upload=malformed_uploads())
def test_the_process_refuses_the_same(upload: Upload, sandbox: Sandbox) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = upload.write(Path(folder))
        with pytest.raises(RejectedError) as here:
            check_upload(*paths, MANIFEST, UploadLimits())
        with pytest.raises(RejectedError) as there:
            sandbox.check(*paths)
    assert str(there.value) == str(here.value)


def greedy_upload() -> Upload:
    """Two million blocks of one value: small on disk, hundreds of bytes each once looked at."""
    count = 2_000_000
    index = torch.stack([torch.arange(count), torch.zeros(count)], 1).int()
    tensors = {
        LAYER + ".blocks": torch.zeros(count, 1, 1, dtype=torch.half),
        LAYER + ".block_index": index,
    }
    fields = json.loads(smt().config) | {"block_size": 1}
    return Upload(json.dumps(fields).encode(), save(tensors))


def test_memory_is_bounded(tmp_path: Path) -> None:
    sandbox = Sandbox(MANIFEST, limits=SandboxLimits(memory_bytes=100 << 20))
    with pytest.raises(RejectedError, match="more memory than"):
        sandbox.check(*greedy_upload().write(tmp_path))
    paths = lut().write(tmp_path)
    assert sandbox.check(*paths).kind == "SPALLM_LUT"  # the next one is none the worse
    sandbox.close()


def test_time_is_bounded(tmp_path: Path) -> None:
    sandbox = Sandbox(MANIFEST, limits=SandboxLimits(seconds=0.01))
    with pytest.raises(RejectedError, match="took longer than"):
        sandbox.check(*greedy_upload().write(tmp_path))
    sandbox.close()


def test_a_process_that_is_killed(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.warm_up()
    (spare,) = sandbox._waiting
    assert spare is not None
    spare.kill()
    spare.wait()
    assert sandbox.check(*lut().write(tmp_path)).kind == "SPALLM_LUT"


def test_a_store_with_a_process(tmp_path: Path) -> None:
    base = ServedBase("base", Sandbox(MANIFEST))
    with AdapterStore(location(tmp_path), base) as store:
        acme = tenant(store, "acme")
        result = store.put(acme, "acme", "support", *lut().write(tmp_path / "upload"))
        assert result.created
        assert store.validate(acme, *lut().write(tmp_path / "upload")).digest == (
            result.version.digest
        )
