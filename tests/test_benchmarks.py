"""The benchmarks' own code: records, tables, made-up models."""

from __future__ import annotations

import copy
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from spallm_serve.benchmarks import kernels
from spallm_serve.benchmarks.cli import app
from spallm_serve.benchmarks.command import parse_pairs
from spallm_serve.benchmarks.lloyd import lloyd_records
from spallm_serve.benchmarks.model import write_random_llama
from spallm_serve.benchmarks.quality import RememberedLogits, chosen_peers
from spallm_serve.benchmarks.records import BenchmarkResults, Record, results, write_results
from spallm_serve.benchmarks.resume import Killable, directory_digest, resume_records
from spallm_serve.benchmarks.timing import allocated_bytes
from spallm_serve.benchmarks.training import kept_bytes
from spallm_serve.benchmarks.training_memory import train_on_random_tokens
from spallm_serve.benchmarks.tuning import METHODS, TuningRun, parse_run, together
from spallm_serve.errors import UserError
from spallm_serve.evaluation import compare
from spallm_serve.models import open_source, skeleton
from tests.tiny_models import CONFIGS, save_tiny, save_tokenizer

QUALITY = {
    "bits_per_weight": 3.2, "setting": "bits=3", "kl": 0.2, "kl_standard_error": 0.01,
    "top1_agreement": 0.8, "perplexity_standard_error": 1.5, "seconds": 12.0,
}  # fmt: skip


def test_results_round_trip_and_hide_where_files_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/spallm-bench", "quality", "--text", "/a/b/c.txt"])
    record = Record(
        bench="quality", case={"method": "SpaLLM", **QUALITY}, metric="perplexity", ours=30
    )
    found = results([record])
    assert found.command == "spallm-bench quality --text c.txt"
    write_results(found, tmp_path / "deep" / "found.json")
    again = BenchmarkResults.model_validate_json((tmp_path / "deep" / "found.json").read_text())
    assert again == found


def test_table_has_ours_in_bold_and_most_bits_first(tmp_path: Path) -> None:
    ours = Record(
        bench="quality", case={"method": "SpaLLM", **QUALITY}, metric="perplexity", ours=30
    )
    peer = Record(
        bench="quality",
        case={"method": "Peer", **QUALITY, "bits_per_weight": 4.5},
        metric="perplexity",
        peer=40,
        peer_name="Peer",
    )
    write_results(results([ours, peer]), tmp_path / "found.json")
    printed = CliRunner().invoke(app, ["table", str(tmp_path / "found.json")]).output
    lines = printed.strip().splitlines()
    assert lines[2].startswith("| Peer | bits=3 | 4.50 | 40.00 ± 1.5")
    assert lines[3].startswith("| **SpaLLM** | bits=3 | 3.20 | 30.00 ± 1.5")
    assert CliRunner().invoke(app, ["table", str(tmp_path / "absent.json")]).exit_code == 2


def test_there_is_no_table_of_other_results(tmp_path: Path) -> None:
    write_results(
        results([Record(bench="engine", case={"tenants": 8}, metric="tokens_s", ours=30)]),
        tmp_path / "found.json",
    )
    printed = CliRunner().invoke(app, ["table", str(tmp_path / "found.json")])
    assert printed.exit_code == 2
    assert "results of engine" in printed.output


_MEASURES = """
import sys, time
from spallm_serve.benchmarks.command import measuring
with measuring(None) as folder:
    try:
        print(folder, flush=True)
        time.sleep(60)
    finally:
        print("ended its server", flush=True)
"""


def test_a_benchmark_that_is_terminated_leaves_nothing() -> None:
    command = [sys.executable, "-c", _MEASURES]
    measures = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert measures.stdout is not None
    folder = Path(measures.stdout.readline().strip())
    assert folder.is_dir()
    measures.send_signal(signal.SIGTERM)
    said, _ = measures.communicate(timeout=60)
    assert (said, measures.returncode) == ("ended its server\n", 128 + signal.SIGTERM)
    assert not folder.exists()


def test_random_llama_is_a_whole_model(tmp_path: Path) -> None:
    source = open_source(str(write_random_llama(tmp_path / "llama", 1)), tmp_path / "none")
    model = skeleton(source.config)
    assert {name for name, _ in model.named_parameters()} == set(source.reader)


def test_directory_digest_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    first = directory_digest(tmp_path)
    (tmp_path / "a").write_text("two")
    second = directory_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, directory_digest(tmp_path)}) == 3


def test_lloyd_benchmark_measures_each_number_of_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spallm_serve.benchmarks.lloyd._SIZE", 64)
    records = lloyd_records()
    assert [record.case["bits"] for record in records] == [2, 3, 4]
    assert all(record.ours is not None and record.ours > 0 for record in records)


def test_remembered_logits_judge_as_the_model_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = (AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval() for _ in "ab")
    windows = torch.randint(3, 131, (5, 16))
    remembered = RememberedLogits(first, windows, tmp_path / "logits")
    wanted = compare(first, second, windows)
    assert compare(remembered, second, windows) == wanted
    assert compare(remembered, second, windows.flip(0)).divergence.value == pytest.approx(
        wanted.divergence.value
    )


def test_peers_are_chosen_by_module_and_setting() -> None:
    assert chosen_peers("none") == []
    assert chosen_peers("nf4:x,round_to_nearest:2bit-row") == [
        ("nf4", "x"),
        ("round_to_nearest", "2bit-row"),
    ]
    assert len(chosen_peers("kmeans")) == 3
    assert len(chosen_peers("all")) > 10
    with pytest.raises(UserError, match="gptq:4bit"):
        chosen_peers("nf4,gptq:4bit")


def test_kernel_benchmark_covers_decode_tenants_prefill_and_gradient(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "SHAPES", {"tiny": ((24, 40),)})
    monkeypatch.setattr(kernels, "_POOL_BYTES", 1 << 16)
    arguments = ["kernels", "--seconds", "0", "--json", str(tmp_path / "found.json")]
    arguments += ["--plot", str(tmp_path / "found.png")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    found = BenchmarkResults.model_validate_json((tmp_path / "found.json").read_text()).records
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    decode = {(r.case["bits"], r.case["tokens"], r.case["tenants"]) for r in found[1:]}
    assert decode >= {(bits, 8, count) for bits in (2, 3, 4) for count in (1, 8)}
    metrics = {"copy_bytes_per_s", "time_s", "gradient_s", "gradient_bytes"}
    assert {r.metric for r in found} == metrics
    assert all(r.ratio is not None and r.ratio > 0 for r in found[1:])
    assert CliRunner().invoke(app, ["kernels", "--model", "GPT-9"]).exit_code == 2
    lines = CliRunner().invoke(app, ["table", str(tmp_path / "found.json")]).output.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| 24 x 40", str(bits)] for bits in (4, 3, 2)
    ]
    assert all(line.count("x |") == 8 for line in lines[2:])


def test_allocated_bytes_are_the_most_held_at_a_time() -> None:
    x = torch.randn(64, 1000)
    assert x.nbytes <= allocated_bytes(lambda: x + 1) < 1.1 * x.nbytes
    assert 2 * x.nbytes <= allocated_bytes(lambda: (x + 1) + 1) < 2.1 * x.nbytes


def test_generation_benchmark_compares_each_variant_with_the_original(tmp_path: Path) -> None:
    source = save_tokenizer(save_tiny("llama", tmp_path / "model"))
    found = tmp_path / "found.json"
    arguments = ["generation", "--model", str(source), "--new-tokens", "4", "--seconds", "0"]
    arguments += ["--variant", "bits=2", "--variant", "bits=4,embeddings=4", "--json", str(found)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    records = BenchmarkResults.model_validate_json(found.read_text()).records
    assert [(r.case["bits"], r.case.get("embeddings")) for r in records] == [(2, None), (4, 4)]
    assert all(
        r.ours and r.peer and r.ratio == pytest.approx(r.ours / r.peer, 0.1) for r in records
    )


def test_a_stopped_quality_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file holds is kept and skipped; another command's results are not touched."""
    path = tmp_path / "found.json"
    skipped = []

    def measured(*args: object, skip: int, **kwargs: object) -> Iterator[Record]:
        skipped.append(skip)
        for number in range(skip, 3):
            yield Record(bench="quality", case={"number": number}, metric="m", ours=number)
            if number == 1 and skip == 0:
                raise UserError("stopped")

    monkeypatch.setattr("spallm_serve.benchmarks.quality.quality_records", measured)
    monkeypatch.setattr("spallm_serve.benchmarks.cli.model_directory", lambda model, folder: folder)
    command = ["quality", "--calibration", "c.txt", "--text", "t.txt", "--json", str(path)]

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["spallm-bench", *arguments])
        return CliRunner().invoke(app, list(arguments)).exit_code

    assert run(*command, "--go-on") == 2
    assert run(*command, "--go-on") == 0
    assert skipped == [0, 2]
    found = BenchmarkResults.model_validate_json(path.read_text())
    assert [record.case["number"] for record in found.records] == [0, 1, 2]
    assert "--go-on" not in found.command
    assert run(*command, "--windows", "2", "--go-on") == 2
    assert BenchmarkResults.model_validate_json(path.read_text()) == found


def test_kept_bytes_are_those_of_the_activations() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 4))
    layers[0].requires_grad_(False)
    x = torch.randn(3, 6)
    # The second layer keeps what it reads for its weight's gradient; the first one nothing.
    assert kept_bytes(lambda: layers(x).sum().backward(), layers) == 4 * 3 * 5
    # Squaring keeps its input, which two operations share.
    both = torch.randn(7, requires_grad=True)
    assert kept_bytes(lambda: (both * both + both.square()).sum().backward(), layers) == 4 * 7


def test_runs_are_read_as_written() -> None:
    run = parse_run("lut/bits=2/learning_rate=0.003,lut.rows=0.5", parse_pairs)
    assert (run.method, run.base) == ("lut", {"bits": 2})
    assert run.settings == {"learning_rate": 0.003, "lut": {"rows": 0.5}}
    assert parse_run("lora/dense", parse_pairs) == TuningRun("lora", None, {})
    for wrong in ("lut", "magic/dense", "lut/bits=2/a=1/b=2", "lut/bits"):
        with pytest.raises(UserError):
            parse_run(wrong, parse_pairs)
    lora = together(METHODS["lora"], {"sparselora": {"rank": 4}})
    assert lora == {"method": "sparselora", "sparselora": {"rank": 4, "sparsity": "none"}}


def rows_file(path: Path, count: int = 12) -> Path:
    """Rows to learn that are questions, too."""
    path.parent.mkdir(exist_ok=True)
    rows = [
        {
            "instruction": f"Is {number} even?\n\nAnswer format: true/false",
            "output": f"the correct answer is {(answer := str(number % 2 == 0).lower())}",
            "answer": answer,
        }
        for number in range(count)
    ]
    path.write_text(json.dumps(rows))
    return path


def tiny_llama(directory: Path) -> Path:
    return save_tokenizer(save_tiny("llama", directory))


def test_tuning_benchmark_judges_methods_and_controls_before_and_after(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    rows = rows_file(tmp_path / "even" / "rows.json")
    text = tmp_path / "text.txt"
    text.write_text("true is not false and seven is odd. " * 60)
    found = tmp_path / "found.json"
    command = ["tuning", "--data", str(rows), "--data", str(rows_file(tmp_path / "b.json", 3))]
    command += ["--text", str(text), "--held-out", str(rows), "--questions", str(rows)]
    command += ["--rows", "5", "--limit", "4", "--windows", "2", "--steps", "2", "--seeds", "2"]
    command += ["--settings", "max_length=64,batch_size=2,accumulation=1"]
    command += ["--run", "lut/bits=2,samples=2,seqlen=16/learning_rate=0.02", "--run", "lora/dense"]
    command += ["--model", str(model), "--json", str(found), "--scratch", str(tmp_path / "scratch")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    records = BenchmarkResults.model_validate_json(found.read_text()).records
    assert [(r.case["method"], r.case["seed"]) for r in records[::3]] == [
        ("lut", 0), ("lora", 0), ("lut", 1), ("lora", 1),
    ]  # fmt: skip
    assert [(r.metric, r.case["on"], r.better) for r in records[:3]] == [
        ("perplexity", "text.txt", "lower"),
        ("held_out_loss", "rows.json", "lower"),
        ("accuracy", "even", "higher"),
    ]
    for record in records:
        controls = record.case["method"] == "lora"
        assert (record.ours is None) == controls
        value = record.peer if controls else record.ours
        if record.metric == "held_out_loss":
            assert value != record.case["before"]
            assert value == pytest.approx(record.case["before"], rel=0.5)
    by_seed = [r.ours for r in records if r.metric == "held_out_loss" and r.ours is not None]
    assert by_seed[0] != by_seed[1]
    nothing = CliRunner().invoke(app, ["tuning", "--data", str(rows), "--run", "lora/dense"])
    assert nothing.exit_code == 2
    assert "--held-out" in nothing.output


def test_training_benchmark_compares_steps_with_loras(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model")
    monkeypatch.setattr(
        "spallm_serve.benchmarks.training_cli.model_directory", lambda name, folder: model
    )
    found = tmp_path / "found.json"
    command = ["training", "--data", str(rows_file(tmp_path / "rows.json")), "--seconds", "0"]
    command += ["--variant", "smt/dense/smt.blocks=2,smt.block_size=16", "--variant", "lut/bits=2"]
    command += ["--variant", "sparselora/dense/sparselora.sparsity=o2"]
    command += ["--json", str(found), "--plot", str(tmp_path / "found.png")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    records = BenchmarkResults.model_validate_json(found.read_text()).records
    shares = [r for r in records if r.metric == "estimators_of_a_step"]
    assert [r.case["variant"].split("/")[0] for r in shares] == ["sparselora"]
    assert 0 < shares[0].ours < 1
    records = [r for r in records if r not in shares]
    assert [r.metric for r in records] == ["step_s", "kept_activation_bytes", "flops"] * 3
    assert [r.case["base"] for r in records[::3]] == ["dense", "2 bits", "dense"]
    assert records[0].case["parameters"] == 2 * 16 * 16
    assert all(r.ours and r.peer and r.ratio == round(r.peer / r.ours, 3) for r in records)
    for record in records[2:6:3]:
        assert record.ours == pytest.approx(record.case["by_formula"], rel=0.03)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    wrong = ["training", "--data", "x", "--variant", "lut/bits=2,groups_per_row=2"]
    assert CliRunner().invoke(app, wrong).exit_code == 2


def test_training_memory_trains_on_random_tokens(tmp_path: Path) -> None:
    """The step itself; a random Llama of the benchmark's width takes a minute."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 32000
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    train_on_random_tokens(str(tmp_path), "lora", {}, rows=1, length=16, stock=True)


GOES_ON = """
import sys, time
from pathlib import Path
def app():
    out = Path(sys.argv[-1])
    out.mkdir(exist_ok=True)
    lines = out / "lines"
    done = len(lines.read_text().splitlines()) if lines.exists() else 0
    if done and "forgetful" in sys.argv:
        lines.write_text("what another run began\\n" + lines.read_text())
    for step in range(done, 150):
        time.sleep(0.02)
        with lines.open("a") as file:
            file.write(f"{step}\\n")
    (out / "last").touch()
"""


@pytest.mark.parametrize("forgetful", [False, True])
def test_a_killed_command_is_held_against_an_undisturbed_one(
    forgetful: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "goes_on.py").write_text(GOES_ON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = Killable("it", "goes_on", ("forgetful",) if forgetful else (), "last")
    (tmp_path / "scratch").mkdir()
    (record,) = resume_records(command, tmp_path / "scratch", kills=3, seed=0)
    assert (record.ours, record.case["kills"]) == (not forgetful, 3)


def test_a_training_run_that_is_left_alone_makes_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands that would be killed; tests of the trainer and of the compressor do it."""

    def run(self: Killable, output: Path, kill_after: float | None) -> bool:
        arguments = [*self.arguments, "-o", str(output)]
        result = CliRunner().invoke(importlib.import_module(self.module).app, arguments)
        assert result.exit_code == 0, result.output
        return False

    monkeypatch.setattr(Killable, "run", run)
    model = tiny_llama(tmp_path / "model")
    rows, found = rows_file(tmp_path / "rows.json"), tmp_path / "found.json"
    command = ["resume", "--train", str(rows), "--model", str(model), "--kills", "1"]
    command += ["--json", str(found), "--scratch", str(tmp_path / "scratch")]
    for option in ("--steps", "6", "--max-length", "48", "--set", "save_every=1"):
        command += ["--option", option]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (record,) = BenchmarkResults.model_validate_json(found.read_text()).records
    assert (record.ours, record.case["command"], record.case["kills"]) == (1, "spallm-train", 0)
    adapters = [tmp_path / "scratch" / name for name in ("undisturbed", "killed")]
    assert directory_digest(adapters[0]) == directory_digest(adapters[1])
    assert (adapters[0] / "adapter_model.safetensors").is_file()
