"""Decode throughput inside vLLM: base alone and many tenants, beside the original and LoRAs."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from spallm_serve.adapter import Adapter, LoraConfig, LutConfig
from spallm_serve.adapter_files import write_adapter
from spallm_serve.benchmarks.apart import measured_apart
from spallm_serve.benchmarks.model import has_tokenizer
from spallm_serve.benchmarks.records import Record
from spallm_serve.errors import UserError
from spallm_serve.identity import base_identity
from spallm_serve.layers import SketchedLinear, is_linear, weight_shape
from spallm_serve.models import load_model

_PROMPT_TOKENS = 16
_RANK = 16


def engine_records(
    dense: Path,
    base: Path,
    scratch: Path,
    *,
    tenants: int,
    tokens: int,
    rounds: int,
    dtype: str = "bfloat16",
) -> Iterator[Record]:
    """Requests that decode together, all of the base and then each of its own tenant.

    Every engine is a process of its own, one after another; within one, the two mixtures take
    turns, so that their ratio does not depend on what else the machine does.

    Args:
        dense: the original.
        base: what was made of it.
        scratch: for adapters with random values.
        tenants: requests at a time, and distinct adapters.
        tokens: that each decodes.
        rounds: of each mixture.
        dtype: of activations and of the original's weights: ``bfloat16``, or ``float32``, which is
            faster on processors that emulate bfloat16.
    """
    tables = make_tables(base, scratch / "tables", tenants)
    loras = make_loras(dense, scratch / "loras", tenants, _RANK)
    ours = _measure(base, tables, tenants, tokens, rounds, dtype)
    theirs = _measure(dense, loras, tenants, tokens, rounds, dtype)
    plain = _measure(dense, [], tenants, tokens, rounds, dtype)
    for mixture, found, name in (
        ("base_only", plain, f"vLLM, {dtype}, compiled, no adapters possible"),
        ("base_only", theirs, f"vLLM, {dtype}, LoRAs possible"),
        ("distinct_tenants", theirs, f"vLLM, {dtype}, LoRAs of rank {_RANK}"),
    ):
        yield Record(
            bench="engine",
            case={"requests": tenants, "tokens": tokens, "mixture": mixture, "model": dense.name},
            metric="decoded_tokens_per_s",
            ours=ours[mixture],
            peer=found[mixture],
            peer_name=name,
            ratio=round(ours[mixture] / found[mixture], 3),
            better="higher",
            runs=rounds,
        )
    for name, found in (("ours", ours), (f"{dtype} and LoRAs", theirs)):
        yield Record(
            bench="engine",
            case={"requests": tenants, "of": name},
            metric="tenants_share_of_base_only",
            ours=round(found["distinct_tenants"] / found["base_only"], 3),
            better="higher",
            runs=rounds,
        )
    yield Record(
        bench="engine",
        case={"what": "from host memory into a slot", "slot_bytes": ours["slot_bytes"]},
        metric="swap_s",
        ours=ours["swap_s"],
        runs=rounds,
    )


def make_tables(base: Path, folder: Path, count: int) -> list[Path]:
    """Adapters that replace all of a base's tables, by nearly the same values."""
    model = load_model(base)
    digest = base_identity(model)
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number in range(count):
        tensors = {
            f"{name}.tables": (
                module.tables * (1 + 0.01 * torch.randn(module.tables.shape, generator=generator))
            ).half()
            for name, module in model.named_modules()
            if isinstance(module, SketchedLinear)
        }
        paths.append(folder / str(number))
        write_adapter(Adapter(LutConfig(base_digest=digest), tensors), paths[-1])
    return paths


def make_loras(model_dir: Path, folder: Path, count: int, rank: int) -> list[Path]:
    """LoRAs on all linears of the blocks, with small values, in bfloat16."""
    model = load_model(model_dir)
    targets = {
        name: weight_shape(module)
        for name, module in model.named_modules()
        if is_linear(module) and name != "lm_head"
    }
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
              "target_modules": leaves, "bias": "none"}  # fmt: skip
    config = LoraConfig(r=rank, lora_alpha=2 * rank, fields=fields)
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number in range(count):
        tensors = {}
        for name, (rows, columns) in targets.items():
            a = 0.01 * torch.randn(rank, columns, generator=generator)
            b = 0.01 * torch.randn(rows, rank, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
        paths.append(folder / str(number))
        write_adapter(Adapter(config, tensors), paths[-1])
    return paths


def _measure(
    model: Path, adapters: list[Path], requests: int, tokens: int, rounds: int, dtype: str
) -> dict[str, Any]:
    """What an engine of its own process says."""
    told = {
        "model": str(model),
        "adapters": [str(path) for path in adapters],
        "count": requests,
        "tokens": tokens,
        "rounds": rounds,
        "dtype": dtype,
    }
    return measured_apart(__name__, told)


def run_engine(
    model: str, adapters: list[str], count: int, tokens: int, rounds: int, dtype: str
) -> dict[str, Any]:
    """Tokens a second of both mixtures, and how long a slot takes to fill.

    Args:
        model: directory.
        adapters: directories, one for each request; none for an engine without them.
        count: requests at a time.
        tokens: that each request decodes.
        rounds: of each mixture; medians are taken.
        dtype: vLLM's.
    """
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    compressed = "quantization_config" in json.loads((Path(model) / "config.json").read_text())
    more: dict[str, Any] = {}
    if adapters:
        more |= {"enable_lora": True, "max_loras": count, "max_lora_rank": _RANK}
    if compressed:
        more["worker_extension_cls"] = "spallm_serve.server.vllm_compat.SlotWorkerExtension"
    engine = LLM(
        model,
        dtype=dtype,
        # vLLM compiles nothing with LoRAs on a CPU; told so, it takes its own kernels in place of
        # what it would have a compiler fuse.
        enforce_eager=bool(adapters) and not compressed,
        max_model_len=_PROMPT_TOKENS + tokens + 2,
        max_num_seqs=count,
        skip_tokenizer_init=not has_tokenizer(Path(model)),
        enable_prefix_caching=False,
        **more,
    )
    requests = [
        LoRARequest(f"tenant/{number}@{number}", number + 1, path)
        for number, path in enumerate(adapters)
    ]
    mixtures: dict[str, list[Any]] = {"base_only": [None] * count}
    if requests:
        mixtures["distinct_tenants"] = requests
    seconds: dict[str, list[float]] = {name: [] for name in mixtures}
    for number in range(rounds + 1):
        for name, mixture in mixtures.items():
            taken = _decode_seconds(engine, mixture, tokens)
            if number:  # the first loads and warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    if min(medians.values()) <= 0:
        raise UserError(f"{tokens} tokens are too few to be timed beside their prompt")
    found: dict[str, Any] = {
        name: round(count * tokens / median, 1) for name, median in medians.items()
    }
    if compressed:
        (swap,) = engine.collective_rpc("spallm_time_swap", args=(adapters[0], rounds))
        (facts,) = engine.collective_rpc("spallm_residency")
        found |= {"swap_s": swap, "slot_bytes": facts["slot_bytes"]}
    return found


def _decode_seconds(engine: Any, mixture: list[Any], tokens: int) -> float:
    """So many more tokens for each request take, beyond the prompt and a first one."""
    return _seconds(engine, mixture, 1 + tokens) - _seconds(engine, mixture, 1)


def _seconds(engine: Any, mixture: list[Any], tokens: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [
        {"prompt_token_ids": [3 + (7 * number + place) % 100 for place in range(_PROMPT_TOKENS)]}
        for number in range(len(mixture))
    ]
    started = time.perf_counter()
    engine.generate(prompts, sampling, lora_request=mixture, use_tqdm=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(run_engine(**json.loads(sys.argv[1]))))
