"""Peer: the block formats of llama.cpp, through its own quantizer, with or without calibration.

llama.cpp mixes formats within a model: a setting such as ``Q3_K_M`` names the commonest one, more
important layers get wider ones, and a layer whose inputs are no multiple of 256 gets a format with
smaller blocks in place of a "K" or "IQ" one. The bits reported are those of the formats chosen.

With ``+imatrix`` the quantizer weighs the columns of every layer by the mean square of its inputs
over the calibration windows: the statistic that llama.cpp's own tool gathers, taken here from the
same windows that the other peers see.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .interface import PeerResult
from .support import Measured, block_linears, load_model, replace_weight, require

SETTINGS: tuple[str, ...] = (
    "Q4_K_M+imatrix",
    "Q3_K_M",
    "Q3_K_M+imatrix",
    "Q4_0",
    "Q4_0+imatrix",
    "IQ4_XS+imatrix",
    "Q3_K_S+imatrix",
    "Q2_K+imatrix",
)

_IMATRIX = "+imatrix"


@functools.lru_cache(maxsize=1)
def _importance(model_dir: Path, windows: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """:func:`_input_mean_squares` of the original and the seconds it took; once for all settings
    that are given the same windows."""
    model = load_model(model_dir)
    with Measured() as measured:
        means = _input_mean_squares(model, windows)
    return means, measured.seconds


@torch.inference_mode()
def _input_mean_squares(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean square of every block linear's inputs over windows ``[windows, tokens]``.

    Returns:
        By layer name, float32 ``[in]``.
    """
    sums: dict[str, torch.Tensor] = {}
    handles = []

    def watch(name: str, linear: nn.Linear) -> None:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] += inputs[0].double().square().flatten(0, -2).sum(0)

        sums[name] = torch.zeros(linear.in_features, dtype=torch.float64)
        handles.append(linear.register_forward_pre_hook(add))

    for name, linear in block_linears(model):
        watch(name, linear)
    try:
        body: Any = model.base_model  # without the output head, whose logits nobody needs
        for window in windows:
            body(window[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / windows.numel()).float() for name, total in sums.items()}


def _write_gguf(path: Path, model: nn.Module, names: dict[str, str]) -> None:
    """Write the block linears as float32 GGUF under llama.cpp's names.

    The quantizer reads the model's shape and its tensors' names, but runs nothing. So the tensors
    that stay as they are can be left out, and so can the reordering of query and key rows that
    llama.cpp's attention would want: its blocks lie within rows.
    """
    gguf = require("gguf", "gguf")
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, linear in block_linears(model):
        writer.add_tensor(names[name], linear.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantize(
    source: Path, target: Path, ftype: str, importance: dict[str, torch.Tensor] | None
) -> None:
    """Run llama.cpp's quantizer from one GGUF file to another.

    Args:
        source: the float32 file.
        target: the file to write.
        ftype: llama.cpp's name of the mixture of formats, such as ``Q3_K_M``.
        importance: by GGUF tensor name, float32 ``[in]``; ``None`` to treat columns alike.
    """
    llama = require("llama_cpp.llama_cpp", "llama-cpp-python")
    code = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{ftype}", None)
    if code is None:
        raise ValueError(f"unknown setting {ftype!r}: llama.cpp has no such type")
    # The bindings print what llama.cpp logs, a line a tensor, unless their logger's level forbids.
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama.llama_backend_init()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = code
    parameters.nthread = torch.get_num_threads()
    if importance is not None:
        # One entry more than there are tensors: a null name ends the list.
        entries = (llama.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name = name.encode()
            entry.data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
            entry.size = values.numel()
        parameters.imatrix = entries
    status = llama.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    if status != 0:
        raise RuntimeError(f"llama.cpp could not quantize to {ftype} (status {status})")


@contextlib.contextmanager
def _temporary(*paths: Path) -> Iterator[None]:
    """Remove the files when done."""
    try:
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def compress(model_dir: Path, calibration: torch.Tensor, setting: str, scratch: Path) -> PeerResult:
    """Compress with llama.cpp; see :class:`.interface.Compress`.

    Settings are llama.cpp's names of types (``Q4_0``, ``Q3_K_M``), ``+imatrix`` added to calibrate.
    Takes models of the Llama architecture only.
    """
    gguf = require("gguf", "gguf")
    model = load_model(model_dir)
    config: Any = model.config
    if config.model_type != "llama":
        raise ValueError(f"this peer takes Llama models, not {config.model_type!r}")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    names = {name: f"{known.get_name(name)}.weight" for name, _ in block_linears(model)}

    source, target = scratch / "llamacpp-float32.gguf", scratch / "llamacpp-quantized.gguf"
    with _temporary(source, target):
        _write_gguf(source, model, names)
        importance, gathering = None, 0.0
        if setting.endswith(_IMATRIX):
            means, gathering = _importance(model_dir, calibration)
            importance = {names[name]: values for name, values in means.items()}
        with Measured() as measured:
            _quantize(source, target, setting.removesuffix(_IMATRIX), importance)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
        stored = weights = 0
        for name, linear in block_linears(model):
            tensor = tensors[names[name]]
            decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            replace_weight(linear, torch.from_numpy(decoded))
            stored += int(tensor.n_bytes) * 8
            weights += linear.weight.numel()
    return PeerResult(
        "llama.cpp",
        setting,
        stored / weights,
        gathering + measured.seconds,
        model,
        measured.peak_rss_bytes,
    )
