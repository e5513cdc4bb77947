"""Compile every Triton program ahead of time, without a GPU, and report what ptxas says of it.

Run in a process of its own: under the interpreter, in which the other tests run, nothing compiles.
Prints a JSON list of {program, capability, case, registers, spills}.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spallm_serve.kernels.gpu import gradients, launch, products

CAPABILITIES = (80, 90)
POINTERS = {
    "slots": "*i32",
    "codes": "*i32",
    "parts": "*fp32",
    "dense": "*fp32",
    "dtables": "*fp32",
}
SIZES = ("tokens", "rows", "columns", "groups", "units", "quads", "n_slots", "first_row")
SIZES += ("part_eights", "most_slots", "parts_of_few", "parts_of_many")
ALIGNED = ("rows", "columns")

# program, the launcher's block shape, tokens in a block, further constants
EACH, BLOCKS, BUCKETS = (
    products.multiply_each, products.multiply_blocks, products.multiply_by_buckets,
)  # fmt: skip
CASES = [
    (EACH, "each", None, {"HAS_SLOTS": False, "HAS_BIAS": False}),
    (EACH, "each", None, {"HAS_SLOTS": True, "HAS_BIAS": True}),
    (BLOCKS, "few tokens", 16, {"HAS_SLOTS": False}),
    (BLOCKS, "few tokens", 32, {"HAS_SLOTS": False}),
    (BLOCKS, "many tokens", 64, {"HAS_SLOTS": False}),
    (BLOCKS, "many tokens", 64, {"HAS_SLOTS": True}),
    (BUCKETS, "buckets", 16, {}),
    (BUCKETS, "buckets", 32, {}),
    (products.add_parts, "added parts", None, {"HAS_SLOTS": False, "HAS_BIAS": True}),
    (products.add_parts, "added parts", None, {"HAS_SLOTS": True, "HAS_BIAS": False}),
    (products.dequantize, "dequantize", None, {}),
    (gradients.sum_by_code, "table gradient", None, {}),
]


def signature_of(program: object, constants: dict[str, object]) -> dict[str, str]:
    types = {}
    for name in program.arg_names:  # type: ignore[attr-defined]
        if name in constants:
            types[name] = "constexpr"
        elif name in SIZES:
            types[name] = "i32"
        else:
            types[name] = POINTERS.get(name, "*fp16" if name == "tables" else "*bf16")
    return types


def compiled(
    program: object, constants: dict[str, object], shape: dict[str, int], arch: int
) -> str:
    options = {name: shape[name] for name in ("num_warps", "num_stages") if name in shape}
    everything = constants | {name: shape[name] for name in ("ROWS", "EIGHTS") if name in shape}
    signature = signature_of(program, everything)
    source = ASTSource(
        fn=program,
        signature=signature,
        constexprs=everything,
        # As launched: pointers and rows of codes are aligned.
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, (name, kind) in enumerate(signature.items())
            if name in ALIGNED or kind.startswith("*")
        },
    )
    return str(
        triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    )


def ptxas_report(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and bytes spilled."""
    target = re.search(r"\.target (\S+)", ptx)
    assert target is not None
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "program.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [ptxas, "-v", f"-arch={target[1].rstrip(',')}", source, "-o", Path(folder) / "cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    return int(registers[1]), spilled


def main() -> None:
    found = []
    for program, kind, tokens, more in CASES:
        names = program.arg_names
        for bits in (2, 3, 4):
            constants = more | {"BITS": bits}
            constants |= {"PTX": True} if "PTX" in names else {}
            constants |= {"UNIT": launch.UNIT} if "UNIT" in names else {}
            if "BITS" not in names:
                del constants["BITS"]
            constants |= {"TOKENS": tokens} if tokens else {}
            for arch in CAPABILITIES:
                ptx = compiled(program, constants, launch.SHAPES[kind], arch)
                registers, spills = ptxas_report(ptx, arch)
                found.append(
                    {
                        "program": kind,
                        "capability": arch,
                        "case": constants,
                        "registers": registers,
                        "spills": spills,
                    }
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
