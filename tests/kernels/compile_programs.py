"""Compile every Triton program ahead of time, without a GPU, and report what ptxas says of it.

Run in a process of its own: under the interpreter, in which the other tests run, nothing compiles.
Prints a JSON list of {program, capability, case, registers, spills}.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spallm_serve.kernels.gpu import launch, programs

CAPABILITIES = (80, 90)
POINTERS = {"order": "*i32", "slots": "*i32", "codes": "*i32", "dtables": "*fp32"}
POINTERS |= dict.fromkeys(("block_slot", "block_start", "block_stop"), "*i32")
POINTERS |= dict.fromkeys(("slot_start", "slot_stop"), "*i32")
SIZES = ("tokens", "rows", "columns", "groups", "units", "words", "n_slots")

# program, the launcher's choices of block shapes, tokens in a block, further constants
CASES = [
    ("multiply_dequantized", "one token", 1, {"SORTED": False, "HAS_BIAS": False}),
    ("multiply_dequantized", "few tokens", 16, {"SORTED": False, "HAS_BIAS": True}),
    ("multiply_dequantized", "few tokens", 16, {"SORTED": True, "HAS_BIAS": False}),
    ("multiply_dequantized", "many tokens", 128, {"SORTED": True, "HAS_BIAS": False}),
    ("multiply_by_buckets", "buckets", None, {"HAS_BIAS": False}),
    ("multiply_transposed", "input gradient", 128, {"SORTED": True}),
    ("sum_table_gradient", "table gradient", 32, {"SORTED": True}),
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
    options = {name: shape[name] for name in ("num_warps", "num_stages")}
    everything = constants | {name: shape[name] for name in ("ROWS", "UNITS")}
    source = ASTSource(
        fn=program,
        signature=signature_of(program, everything),
        constexprs=everything,
        # As launched: pointers and rows of codes are aligned.
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(program.arg_names)  # type: ignore[attr-defined]
            if name not in everything and name not in ("tokens", "groups", "n_slots", "units")
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


def main(all_shapes: bool) -> None:
    found = []
    for name, kind, tokens, more in CASES:
        program = getattr(programs, name)
        for bits in (2, 3, 4):
            constants = more | {"BITS": bits, "TOKENS": tokens or launch.BUCKET_TOKENS[bits]}
            choices = launch._CHOICES[kind]
            for shape in choices if all_shapes else choices[:1]:
                for arch in CAPABILITIES:
                    registers, spills = ptxas_report(
                        compiled(program, constants, shape, arch), arch
                    )
                    found.append(
                        {
                            "program": name,
                            "capability": arch,
                            "case": {**constants, **shape},
                            "registers": registers,
                            "spills": spills,
                        }
                    )
    print(json.dumps(found))


if __name__ == "__main__":
    main(all_shapes="--all" in sys.argv)
