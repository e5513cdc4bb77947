"""Fine-tunes of other formats moved onto a base's codes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from spallm_serve.adapted import apply_adapter
from spallm_serve.adapter import Adapter
from spallm_serve.adapter_files import read_adapter, write_adapter
from spallm_serve.adapters_store.delta import lora_delta
from spallm_serve.compressor.projection import fit_tables
from spallm_serve.data import file_windows
from spallm_serve.kernels.reference import dequantize
from spallm_serve.layers import SketchedLinear
from spallm_serve.models import is_norm, load_model, load_tokenizer
from spallm_serve.sketch import Sketch
from tests.adapters_store.made import generator, lora
from tests.adapters_store.test_cli import refused, run

Bases = dict[str, dict[str, Path]]
QUICK = ("--samples", "8", "--seqlen", "16")
IDS = torch.arange(3, 35).view(2, 16)


def layers(base: Path) -> dict[str, Sketch]:
    return {
        name: Sketch(module.planes(), module.tables, module.columns)
        for name, module in load_model(base).named_modules()
        if isinstance(module, SketchedLinear)
    }


def hessians(base: Path, text: Path) -> dict[str, Tensor]:
    """Of the inputs of every compressed layer, from one pass of the whole model."""
    model = load_model(base)
    found: dict[str, Tensor] = {}
    windows = file_windows(text, load_tokenizer(base), 16, 8)

    def watch(name: str) -> None:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            found[name] = (2 / windows.numel() * x.T @ x).float()

        model.get_submodule(name).register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, SketchedLinear):
            watch(name)
    with torch.no_grad():
        model(input_ids=windows)
    return found


def losses(text: str) -> dict[str, float]:
    """The printed shares by kind of layer."""
    rows = re.findall(r"^ *(\S+) +\d+ +([\d.]+)% ", text, re.MULTILINE)
    return {kind: float(share) for kind, share in rows}


def written(path: Path, adapter: Adapter) -> Path:
    write_adapter(adapter, path)
    return path


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_without_text_tables_are_means(architecture: str, bases: Bases, tmp_path: Path) -> None:
    base = bases[architecture]["sketched"]
    model = load_model(base)
    sketches = layers(base)
    touched = [name for name in sketches if ".1." in name]
    source = lora(model, touched)
    output = tmp_path / "out"
    text = run("from-lora", written(tmp_path / "lora", source), "--base", base, "-o", output)
    found = read_adapter(output)
    assert found.modules(".tables") == sorted(touched)
    wanted_total, missed_total = 0.0, 0.0
    for name in touched:
        delta = lora_delta(source, source.config, name)  # type: ignore[arg-type]
        sketch = sketches[name]
        own = sketch.tables.float()
        wanted = fit_tables(sketch.codes, own, sketch.weight() + delta).half()
        assert torch.equal(found.tensors[name + ".tables"], wanted)
        missed = delta - dequantize(sketch.codes, wanted.float() - own)
        wanted_total += float(delta.square().sum())
        missed_total += float(missed.square().sum())
    assert losses(text)["all"] == pytest.approx(100 * (missed_total / wanted_total) ** 0.5, abs=0.1)
    assert "numbers a row" in text
    apply_adapter(model, found)
    verified = run("verify", output, "--base", base)
    assert verified.startswith("OK")


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_on_text_outputs_count(architecture: str, bases: Bases, text: Path, tmp_path: Path) -> None:
    base = bases[architecture]["sketched"]
    sketches = layers(base)
    source = lora(load_model(base))
    lora_dir = written(tmp_path / "lora", source)
    plain, weighed = tmp_path / "plain", tmp_path / "weighed"
    run("from-lora", lora_dir, "--base", base, "-o", plain)
    said = run("from-lora", lora_dir, "--base", base, "-o", weighed, "--calibration", text, *QUICK)
    without, found = read_adapter(plain), read_adapter(weighed)
    wanted_total, missed_total = 0.0, 0.0
    for name, hessian in hessians(base, text).items():
        sketch, key = sketches[name], name + ".tables"
        delta = lora_delta(source, source.config, name)  # type: ignore[arg-type]

        def lost(tables: Tensor, sketch: Sketch = sketch, hessian: Tensor = hessian) -> float:
            missed = sketch.weight() + delta - dequantize(sketch.codes, tables.float())  # noqa: B023
            return float(((missed @ hessian) * missed).sum())

        here = lost(found.tensors[key])
        best = fit_tables(sketch.codes, sketch.tables.float(), sketch.weight() + delta, hessian)
        assert here <= lost(without.tensors[key]), name
        assert here == pytest.approx(lost(best), rel=1e-3), name
        wanted_total += float(((delta @ hessian) * delta).sum())
        missed_total += here
    assert losses(said)["all"] == pytest.approx(100 * (missed_total / wanted_total) ** 0.5, abs=0.1)


def test_a_change_that_tables_can_make(dense: Path, sketched: Path, tmp_path: Path) -> None:
    """A whole model whose weights are the base's with other tables is found, and its norms."""
    random = generator(3)
    tuned = load_model(dense)
    wanted: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, sketch in layers(sketched).items():
            noise = 0.05 * torch.randn(sketch.tables.shape, generator=random)
            codes = sketch.codes
            mean = fit_tables(codes, torch.full(noise.shape, torch.nan), torch.ones(codes.shape))
            tables = torch.where(mean.isnan(), sketch.tables, (sketch.tables + noise).half())
            wanted[name + ".tables"] = tables
            tuned.get_submodule(name).weight.copy_(dequantize(codes, tables.float()))
        for name, module in tuned.named_modules():
            if is_norm(module):
                module.weight.add_(0.1)
                wanted[f"{name}.weight"] = module.weight.detach().clone()
    tuned.save_pretrained(tmp_path / "tuned")
    said = run("from-lora", tmp_path / "tuned", "--base", sketched, "-o", tmp_path / "out")
    found = read_adapter(tmp_path / "out")
    assert found.tensors.keys() == wanted.keys()
    assert all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)
    assert losses(said)["all"] == 0
    assert "no place" not in said
    base = load_model(sketched)
    apply_adapter(base, found)
    with torch.no_grad():
        logits = base(input_ids=IDS).logits
        torch.testing.assert_close(logits, tuned(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_whole_model_with_its_original(
    dense: Path, sketched: Path, text: Path, tmp_path: Path
) -> None:
    model = load_model(dense)
    changed = "model.layers.2.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(changed).weight.add_(0.1)
        model.get_submodule(changed).bias.add_(0.1)
        model.get_input_embeddings().weight[7] += 1
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    for number, options in enumerate([(), ("--calibration", text, *QUICK)]):
        output = tmp_path / f"out{number}"
        said = run(
            "from-lora", tmp_path / "tuned", "--base", sketched, "--original", dense,
            "-o", output, *options,
        )  # fmt: skip
        found = read_adapter(output)
        assert set(found.tensors) == {f"{changed}.tables", "model.norm.weight"}
        assert torch.equal(found.tensors["model.norm.weight"], model.model.norm.weight)
        # The same for all weights of a row is a change that tables hold.
        assert losses(said)["mlp.up_proj"] < 0.2
        assert "no place" in said and "embed_tokens" in said and "up_proj.bias" in said
    assert "differs" in refused(
        "from-lora", dense, "--base", sketched, "--original", dense, "-o", tmp_path / "none"
    )


def test_a_lora_on_the_original(dense: Path, sketched: Path, tmp_path: Path) -> None:
    original = load_model(dense)
    name = "model.layers.0.self_attn.o_proj"
    source = lora(original, [name])
    run(
        "from-lora", written(tmp_path / "lora", source), "--base", sketched,
        "--original", dense, "-o", tmp_path / "out",
    )  # fmt: skip
    sketch = layers(sketched)[name]
    delta = lora_delta(source, source.config, name)  # type: ignore[arg-type]
    # The base's own tables are kept: what its compressing cost is not the LoRA's to mend.
    wanted = fit_tables(sketch.codes, sketch.tables.float(), sketch.weight() + delta).half()
    found = read_adapter(tmp_path / "out")
    assert list(found.tensors) == [f"{name}.tables"]
    assert torch.equal(found.tensors[f"{name}.tables"], wanted)


def test_a_compressed_head(dense: Path, text: Path, tmp_path: Path) -> None:
    from spallm_serve.compressor.observer import SilentObserver
    from spallm_serve.compressor.pipeline import compress
    from spallm_serve.compressor.settings import CompressSettings

    base = tmp_path / "base"
    settings = CompressSettings(bits=2, samples=2, seqlen=16, estimator_rank=0, embeddings=4)
    compress(str(dense), base, settings, SilentObserver())
    lora_dir = written(tmp_path / "lora", lora(load_model(base), ["lm_head"]))
    said = run(
        "from-lora", lora_dir, "--base", base, "-o", tmp_path / "out", "--calibration", text, *QUICK
    )
    assert 0 < losses(said)["lm_head"] < 100
    found = read_adapter(tmp_path / "out")
    hessian = hessians(base, text)["lm_head"]
    sketch = layers(base)["lm_head"]
    source = read_adapter(lora_dir)
    target = sketch.weight() + lora_delta(source, source.config, "lm_head")  # type: ignore[arg-type]
    wanted = fit_tables(sketch.codes, sketch.tables.float(), target, hessian)
    torch.testing.assert_close(
        found.tensors["lm_head.tables"].float(), wanted, rtol=5e-3, atol=5e-3
    )


def test_what_peft_writes(dense: Path, sketched: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(dense), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "lora")
    said = run("from-lora", tmp_path / "lora", "--base", sketched, "-o", tmp_path / "out")
    assert losses(said).keys() == {"self_attn.q_proj", "self_attn.v_proj", "all"}
    assert len(read_adapter(tmp_path / "out").tensors) == 6
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    get_peft_model(load_model(dense), dora).save_pretrained(tmp_path / "dora")
    assert "use_dora" in refused(
        "from-lora", tmp_path / "dora", "--base", sketched, "-o", tmp_path / "other"
    )


def test_what_cannot_be_moved(
    bases: Bases, dense: Path, sketched: Path, text: Path, tmp_path: Path
) -> None:
    model = load_model(sketched)
    output = ("-o", tmp_path / "out")
    head = written(tmp_path / "head", lora(model, ["lm_head", "model.layers.0.mlp.up_proj"]))
    message = refused("from-lora", head, "--base", sketched, *output)
    assert "lm_head" in message and "not compressed" in message
    other = bases["gpt2"]["dense"]
    assert "no fine-tune of this base" in refused("from-lora", other, "--base", sketched, *output)
    elsewhere = written(tmp_path / "elsewhere", lora(load_model(other)))
    assert "no such linear" in refused("from-lora", elsewhere, "--base", sketched, *output)
    fits = written(tmp_path / "lora", lora(model))
    assert "is not compressed" in refused("from-lora", fits, "--base", dense, *output)
    assert "something else" in refused("from-lora", fits, "--base", sketched, "-o", fits)
    assert "holds a model" in refused("from-lora", fits, "--base", sketched, "-o", sketched)
    for source in (sketched, tmp_path / "absent"):
        refused("from-lora", source, "--base", sketched, *output)
    refused("from-lora", dense, "--base", sketched, "--original", other, *output)
    given = ("from-lora", fits, "--base", sketched, *output, "--calibration")
    assert "give text" in refused(*given, "self")
    assert "no such file" in refused(*given, tmp_path / "absent.txt")
    assert "shorter than one window" in refused(*given, text, "--seqlen", "5000")
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_base(dense: Path, sketched: Path, tmp_path: Path) -> None:
    """One that names the original is moved where the original is given."""
    from spallm_serve.identity import base_identity

    source = written(tmp_path / "lora", lora(load_model(dense)))
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_digest"] = base_identity(load_model(dense))
    (source / "adapter_config.json").write_text(json.dumps(config))
    out = ("--base", sketched, "-o", tmp_path / "out")
    other = ("--base", sketched, "-o", tmp_path / "other")
    assert "--original" in refused("from-lora", source, *out)
    run("from-lora", source, *out, "--original", dense)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    config["base_digest"] = "0" * 64
    (copy / "adapter_config.json").write_text(json.dumps(config))
    assert "0" * 64 in refused("from-lora", copy, *other, "--original", dense)
