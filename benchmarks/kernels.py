"""lut_linear against torch's linear, and against LoRAs beside it, in one process.

Weights are taken in turn from a pool, as a model's layers are; it is larger than a CPU's caches,
and but for the smallest shapes larger than a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from spallm_serve.benchmarks.records import Record
from spallm_serve.benchmarks.timing import (
    Timing,
    allocated_bytes,
    interleaved,
    interleaved_on_gpu,
)
from spallm_serve.kernels import explain, lut_linear, prepare_codes
from spallm_serve.kernels.choice import backend_of, integers_held
from spallm_serve.kernels.held_tables import HeldTables
from spallm_serve.kernels.packing import SUPPORTED_BITS, pack_codes

SHAPES = {
    "Llama-2-7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "Llama-3-8B": ((1024, 4096), (14336, 4096), (4096, 14336)),
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
}
_PREFILL_TOKENS = 512
TOKENS = (1, 8, 32, 64, _PREFILL_TOKENS)
TENANTS = (1, 8, 64)
LORA_RANK = 16
_POOL_BYTES = 512 << 20
_POOL_LAYERS = 32
_SECONDS = 0.5


@dataclass(frozen=True)
class _Layer:
    """One shape's weights, ours at some bits and the peer's; tables as they are, and as a server
    holds them."""

    model: str
    rows: int
    columns: int
    bits: int
    codes: list[Tensor]
    tables: Tensor
    held: HeldTables
    dense: list[Tensor]

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.tables.device.type

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, and of the peer's weights."""
        return self.dense[0].dtype

    @property
    def dtype_name(self) -> str:
        """As torch calls it."""
        return str(self.dtype).removeprefix("torch.")

    def activations(self, tokens: int, width: int) -> Tensor:
        """Random ones, ``[tokens, width]``."""
        return torch.randn(tokens, width, device=self.device).to(self.dtype)

    def case(self, **more: int | float) -> dict[str, str | int | float | bool | None]:
        return {
            "model": self.model,
            "rows": self.rows,
            "columns": self.columns,
            "bits": self.bits,
            **(
                {}
                if self.held.scales is None
                else {"tables": str(self.held.entries.dtype).removeprefix("torch.")}
            ),
            **more,
        }


def kernel_records(
    models: tuple[str, ...],
    seconds: float = _SECONDS,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Record]:
    """Decode, mixed tenants, LoRAs beside a linear, prefill, the tables' gradient.

    Args:
        models: of :data:`SHAPES`.
        seconds: for each comparison.
        device: ``cpu`` or ``cuda``.
        dtype: of activations and of the linear's weights.
    """
    console = Console(stderr=True)
    on = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    integers = integers_held(device, dtype)
    form = f"tables as {integers or 'they are'}".replace("torch.", "")
    console.print(f"lut_linear runs on {explain(device)}, {on}, {form}")
    bandwidth = copy_bandwidth(seconds, device)
    yield Record(
        bench="kernels", case={}, metric="copy_bytes_per_s", ours=bandwidth, better="higher"
    )
    with torch.no_grad():
        for model in models:
            for rows, columns in SHAPES[model]:
                dense = _dense_pool(rows, columns, device, dtype)
                for bits in SUPPORTED_BITS:
                    layer = _layer(model, rows, columns, bits, dense)
                    for record in _layer_records(layer, bandwidth, seconds):
                        if record.metric != "gradient_bytes":
                            console.print(_line(record))
                        yield record


def copy_bandwidth(seconds: float, device: str = "cpu") -> float:
    """Bytes a second that a device reads and writes when it copies a large tensor."""
    source = torch.empty(_POOL_BYTES // 4, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    timing = _timed({"copy": lambda: target.copy_(source)}, seconds, device)["copy"]
    return 2 * source.nbytes / timing.median


def _layer_records(layer: _Layer, bandwidth: float, seconds: float) -> Iterator[Record]:
    for tokens in TOKENS:
        x = layer.activations(tokens, layer.columns)
        functions: dict[str, Callable[[], object]] = {"linear": _linear(layer, x)}
        counts = [count for count in TENANTS if count <= tokens]
        for count in counts:
            functions[f"{count} tenants"] = _ours(layer, x, count)
        if tokens == 8:
            functions["LoRA"] = _linear_with_loras(layer, x)
        times = _timed(functions, seconds, layer.device)
        for count in counts:
            ours = times[f"{count} tenants"]
            speed = _bytes_needed(layer, tokens, count) / ours.median
            case = layer.case(
                tokens=tokens,
                tenants=count,
                bytes_per_s=int(speed),
                of_floor=round(speed / bandwidth, 3),
            )
            yield _record(case, ours, times["linear"], f"torch {layer.dtype_name} linear")
            if count == 8 and tokens == 8:
                loras = f"{layer.dtype_name} linear + rank-{LORA_RANK} LoRAs"
                yield _record(case, ours, times["LoRA"], loras)
                yield _record(case, ours, times["1 tenants"], "lut_linear, one tenant")
    yield from _gradient_records(layer, seconds)


def _gradient_records(layer: _Layer, seconds: float) -> Iterator[Record]:
    x = layer.activations(_PREFILL_TOKENS, layer.columns)
    dy = layer.activations(_PREFILL_TOKENS, layer.rows)
    codes, tables = layer.codes[0], layer.tables[:1].contiguous()

    def gradient() -> object:
        return torch.ops.spallm.table_gradient(dy, x, codes, tables, None)

    def dense() -> object:
        return dy.T @ x

    times = _timed({"ours": gradient, "dense": dense}, seconds, layer.device)
    case = layer.case(tokens=_PREFILL_TOKENS, tenants=1)
    peer = f"dW by a {layer.dtype_name} matmul"
    yield _record(case, times["ours"], times["dense"], peer, "gradient_s")
    ours, theirs = (allocated_bytes(each, layer.device) for each in (gradient, dense))
    yield Record(
        bench="kernels",
        case=case,
        metric="gradient_bytes",
        ours=ours,
        peer=theirs,
        peer_name=peer,
        ratio=round(theirs / ours, 3),
    )


def _timed(
    functions: dict[str, Callable[[], object]], seconds: float, device: str
) -> dict[str, Timing]:
    return (interleaved if device == "cpu" else interleaved_on_gpu)(functions, seconds)


def _ours(layer: _Layer, x: Tensor, tenants: int) -> Callable[[], object]:
    codes = cycle(layer.codes)
    slots = (torch.arange(x.shape[0], device=x.device) % tenants).int() if tenants > 1 else None
    if layer.held.scales is not None:
        backend = backend_of(layer.codes[0])
        return lambda: layer.held.linear(x, next(codes), backend, slots, 0)
    return lambda: lut_linear(x, next(codes), layer.tables, slots)


def _linear(layer: _Layer, x: Tensor) -> Callable[[], object]:
    weights = cycle(layer.dense)
    return lambda: F.linear(x, next(weights))


def _linear_with_loras(layer: _Layer, x: Tensor) -> Callable[[], object]:
    """A LoRA a token: all the LoRAs' A with their tokens to rank 16, then all B, added to the
    base's output. On the CPU by the gathered einsums of vLLM's CPU path, on a GPU by two batched
    products without the gathering."""
    weights = cycle(layer.dense)
    lora_a = torch.randn(x.shape[0], LORA_RANK, layer.columns, device=x.device).to(x.dtype)
    lora_b = torch.randn(x.shape[0], layer.rows, LORA_RANK, device=x.device).to(x.dtype)
    index = torch.arange(x.shape[0])

    def gathered() -> object:
        y = F.linear(x, next(weights))
        shrunk = torch.einsum("bi,boi->bo", x, lora_a[index])
        return y.add_(torch.einsum("bi,boi->bo", shrunk, lora_b[index]))

    def batched() -> object:
        y = F.linear(x, next(weights))
        return torch.baddbmm(y[:, :, None], lora_b, torch.bmm(lora_a, x[:, :, None]))

    return gathered if layer.device == "cpu" else batched


def _bytes_needed(layer: _Layer, tokens: int, tenants: int) -> int:
    """Codes, the tables of the tenants present, activations in and out: each once."""
    codes = layer.rows * layer.columns * layer.bits // 8
    tables = tenants * layer.held.slot_bytes
    return codes + tables + layer.dtype.itemsize * tokens * (layer.rows + layer.columns)


def _dense_pool(rows: int, columns: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    count = max(2, min(_POOL_LAYERS, _POOL_BYTES // (dtype.itemsize * rows * columns)))
    return [torch.randn(rows, columns, dtype=dtype, device=device) for _ in range(count)]


def _layer(model: str, rows: int, columns: int, bits: int, dense: list[Tensor]) -> _Layer:
    device = dense[0].device
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, device=device)
    packed = prepare_codes(pack_codes(codes, bits), columns, 1, dense[0].dtype)
    tables = torch.randn(max(TENANTS), rows, 1, 1 << bits, device=device).half()
    pool = [packed.clone() for _ in range(max(len(dense), _POOL_BYTES // 4 // packed.nbytes))]
    held = HeldTables.of(tables[0], 1, dense[0].dtype).alike(tables)
    return _Layer(model, rows, columns, bits, pool, tables, held, dense)


def _record(
    case: dict[str, str | int | float | bool | None],
    ours: Timing,
    peer: Timing,
    name: str,
    metric: str = "time_s",
) -> Record:
    return Record(
        bench="kernels",
        case=case,
        metric=metric,
        ours=ours.median,
        peer=peer.median,
        peer_name=name,
        ratio=round(peer.median / ours.median, 3),
        runs=ours.runs,
        spread=(ours.low, ours.high),
    )


def _line(record: Record) -> str:
    case = record.case
    assert record.ours is not None
    line = (
        f"{case['rows']} x {case['columns']}, {case['bits']} bits, {case['tokens']} tokens of "
        f"{case['tenants']} tenants, {record.metric}: {1e3 * record.ours:.3f} ms, "
        f"{record.ratio} x {record.peer_name}"
    )
    if "bytes_per_s" not in case:
        return line
    return f"{line}; {float(case['bytes_per_s'] or 0) / 1e9:.1f} GB/s, {case['of_floor']} of a copy"
