"""Uploads that are wrong in one way each, generated."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.adapters_store.stored import BASE_DIGEST, KINDS, LAYER, Upload

Header = dict[str, Any]
Change = Callable[[st.DrawFn, Upload], Upload]


def unpack(tensors: bytes) -> tuple[Header, bytes]:
    length = struct.unpack("<Q", tensors[:8])[0]
    return json.loads(tensors[8 : 8 + length]), tensors[8 + length :]


def pack(header: Header | str, data: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text.encode())) + text.encode() + data


def _tensors(change: Callable[[st.DrawFn, Header, bytes], bytes]) -> Change:
    """A change of the tensors, given their header and bytes."""

    def applied(draw: st.DrawFn, upload: Upload) -> Upload:
        return Upload(upload.config, change(draw, *unpack(upload.tensors)))

    return applied


def _field(change: Callable[[st.DrawFn, dict[str, Any]], None]) -> Change:
    """A change of one tensor's entry in the header."""

    def applied(draw: st.DrawFn, header: Header, data: bytes) -> bytes:
        change(draw, header[draw(st.sampled_from(sorted(header)))])
        return pack(header, data)

    return _tensors(applied)


def _config(change: Callable[[st.DrawFn, dict[str, Any]], object]) -> Change:
    """A change of the configuration: in place, or to the bytes or object that is returned."""

    def applied(draw: st.DrawFn, upload: Upload) -> Upload:
        fields = json.loads(upload.config)
        found = change(draw, fields)
        found = fields if found is None else found
        encoded = found if isinstance(found, bytes) else json.dumps(found).encode()
        return Upload(encoded, upload.tensors)

    return applied


def _cut(draw: st.DrawFn, upload: Upload) -> Upload:
    end = draw(st.integers(0, len(upload.tensors) - 1))
    return Upload(upload.config, upload.tensors[:end])


def _append(draw: st.DrawFn, upload: Upload) -> Upload:
    return Upload(upload.config, upload.tensors + draw(st.binary(min_size=1, max_size=64)))


def _header_length(draw: st.DrawFn, upload: Upload) -> Upload:
    real = struct.unpack("<Q", upload.tensors[:8])[0]
    huge = st.sampled_from([0, 1, real - 1, real + 1, 1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1])
    length = draw(huge.filter(lambda value: value != real))
    return Upload(upload.config, struct.pack("<Q", length) + upload.tensors[8:])


def _other_file(draw: st.DrawFn, upload: Upload) -> Upload:
    beginnings = [b"PK\x03\x04", b"\x80\x02}q\x00.", b"<html>", b"", b"\x1f\x8b", b"GGUF"]
    return Upload(upload.config, draw(st.sampled_from(beginnings)) + draw(st.binary(max_size=99)))


def _offsets(draw: st.DrawFn, entry: dict[str, Any]) -> None:
    begin, end = entry["data_offsets"]
    by = draw(st.integers(-64, 64).filter(bool))
    which = draw(st.sampled_from(["begin", "end", "both", "swapped"]))
    entry["data_offsets"] = {
        "begin": [begin + by, end],
        "end": [begin, end + by],
        "both": [begin + by, end + by],
        "swapped": [end, begin],
    }[which]


def _same_place(draw: st.DrawFn, header: Header, data: bytes) -> bytes:
    """A second tensor in the bytes of another."""
    name = draw(st.sampled_from(sorted(header)))
    return pack(header | {name + "2": header[name]}, data)


def _odd_field(draw: st.DrawFn, entry: dict[str, Any]) -> None:
    key = draw(st.sampled_from(sorted(entry)))
    odd = [None, -1, 1.5, "x", [], {}, [-1, 2], [True], ["a"], [[1]], [1 << 70], "U64", "F8_E4M3"]
    entry[key] = draw(st.sampled_from(odd).filter(lambda value: value != entry[key]))


def _missing_field(draw: st.DrawFn, entry: dict[str, Any]) -> None:
    del entry[draw(st.sampled_from(sorted(entry)))]


def _extra_field(draw: st.DrawFn, entry: dict[str, Any]) -> None:
    entry[draw(st.sampled_from(["strides", "file", ""]))] = 1


def _other_shape(draw: st.DrawFn, entry: dict[str, Any]) -> None:
    entry["shape"] = draw(st.sampled_from([[*entry["shape"], 1], [1, *entry["shape"]]]))


def _other_name(draw: st.DrawFn, header: Header, data: bytes) -> bytes:
    names = ["../../etc/passwd", "", "a\u202eb", "x" * 300, "lm_head.weight", "__class__", "a\nb"]
    old = draw(st.sampled_from(sorted(header)))
    entry = header.pop(old)
    return pack(header | {draw(st.sampled_from([*names, old + ".tables"])): entry}, data)


def _twice(draw: st.DrawFn, header: Header, data: bytes) -> bytes:
    name = draw(st.sampled_from(sorted(header)))
    text = json.dumps(header)
    return pack(text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}", data)


def _one_more(draw: st.DrawFn, header: Header, data: bytes) -> bytes:
    extra = {"dtype": "F16", "shape": [2], "data_offsets": [len(data), len(data) + 4]}
    name = draw(st.sampled_from(["model.layers.7.mlp.up_proj.tables", "extra", LAYER + ".codes"]))
    return pack(header | {name: extra}, data + b"\0\0\0\0")


def _no_tensor(draw: st.DrawFn, header: Header, data: bytes) -> bytes:
    return pack(draw(st.sampled_from(["{}", "[]", "1", '{"__metadata__": {}}'])), b"")


def _header_text(draw: st.DrawFn, header: Header, data: bytes) -> bytes:
    texts = [
        "{" * 5000,
        "[" * 5000,
        '{"a": NaN}',
        "\x00",
        '{"a": 1,}',
        '{"__metadata__": {"a": 1}}',
    ]
    return pack(draw(st.sampled_from(texts)), data)


def _not_finite(draw: st.DrawFn, header: Header, data: bytes) -> bytes:
    floats = [name for name in sorted(header) if header[name]["dtype"] != "I32"]
    entry = header[draw(st.sampled_from(floats))]
    size = {"F16": 2, "BF16": 2, "F32": 4}[entry["dtype"]]
    exponents = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}[entry["dtype"]]
    value = exponents | draw(st.sampled_from([0, 1]))  # infinity and NaN
    begin, end = entry["data_offsets"]
    place = begin + size * draw(st.integers(0, (end - begin) // size - 1))
    found = bytearray(data)
    found[place : place + size] = value.to_bytes(size, "little")
    return pack(header, bytes(found))


def _config_text(draw: st.DrawFn, fields: dict[str, Any]) -> bytes:
    base = json.dumps(fields)
    texts = [
        "", "[]", "null", '"x"', "[" * 9000, '{"a":' * 9000, base[:-1], base + "x", base + base,
        base[:-1] + ', "peft_type": "LORA"}',
        base[:-1] + ', "lora_alpha": NaN}', base[:-1] + ', "r": ' + "9" * 5000 + "}",
        base + " " * (64 << 10),
    ]  # fmt: skip
    return draw(st.sampled_from([*(text.encode() for text in texts), b"\xff\xfe{}", b"\x80\x02."]))


def _config_field(draw: st.DrawFn, fields: dict[str, Any]) -> None:
    key = draw(st.sampled_from(["peft_type", "base_digest", "new", "auto_mapping"]))
    fields[key] = draw(
        st.sampled_from(
            ["", "x", 0, 1.5, [], [[]], {"a": 1}, "0" * 64, BASE_DIGEST[:-1], "a\x1b[2Jb"]
        )
    )
    if key == "auto_mapping":  # PEFT would import a class by it
        fields["use_dora"] = True


def _missing_config_field(draw: st.DrawFn, fields: dict[str, Any]) -> None:
    needed = {"LORA": ["peft_type", "r", "lora_alpha"]}
    del fields[draw(st.sampled_from(needed.get(fields["peft_type"], ["peft_type", "base_digest"])))]


CHANGES: dict[str, Change] = {
    "cut": _cut,
    "append": _append,
    "header length": _header_length,
    "other file": _other_file,
    "offsets": _field(_offsets),
    "odd field": _field(_odd_field),
    "missing field": _field(_missing_field),
    "extra field": _field(_extra_field),
    "other shape": _field(_other_shape),
    "same place": _tensors(_same_place),
    "other name": _tensors(_other_name),
    "twice": _tensors(_twice),
    "one more": _tensors(_one_more),
    "no tensor": _tensors(_no_tensor),
    "header text": _tensors(_header_text),
    "not finite": _tensors(_not_finite),
    "config text": _config(_config_text),
    "config field": _config(_config_field),
    "missing config field": _config(_missing_config_field),
}


@st.composite
def malformed_uploads(draw: st.DrawFn) -> Upload:
    """A good upload with one of :data:`CHANGES`."""
    upload = KINDS[draw(st.sampled_from(sorted(KINDS)))](draw(st.integers(0, 3)))
    return CHANGES[draw(st.sampled_from(sorted(CHANGES)))](draw, upload)


@st.composite
def flipped_uploads(draw: st.DrawFn) -> Upload:
    """A good upload with some bytes overwritten anywhere; it may still be good."""
    upload = KINDS[draw(st.sampled_from(sorted(KINDS)))](draw(st.integers(0, 3)))
    parts = bytearray(upload.config), bytearray(upload.tensors)
    for _ in range(draw(st.integers(1, 6))):
        part = parts[draw(st.integers(0, 1))]
        part[draw(st.integers(0, len(part) - 1))] = draw(st.integers(0, 255))
    return Upload(bytes(parts[0]), bytes(parts[1]))
