"""Compile the kernels for Hopper without a GPU and read what came out: `make kernels`.

Each case is a launch of production. It fails where registers spill to memory or an instruction that the kernel's speed
rests on is missing.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aiolora.ops.kernels import attention

TARGET = GPUTarget("cuda", 90, 32)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HMMA, HGMMA, COPY_16 = r"\bHMMA\.", r"\bHGMMA\.", r"\bLDGSTS\S*\.128"
COUNTED = {"HMMA": HMMA, "HGMMA": HGMMA, "LDGSTS.128": COPY_16, "LDG.128": r"\bLDG\.\S*128", "spill": r"\b(STL|LDL)\b"}


@dataclass(frozen=True)
class Case:
    """A launch: types of its arguments by name, as "*bf16", "fp32", "i32", or "i32:16" for a multiple of 16."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    expects: tuple[str, ...] = ()


def attention_case(name: str, kernel: Any, blocks: dict[str, int], expects: tuple[str, ...], **shape: Any) -> Case:
    options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
    constexprs = {"PAGE": 16, "PDL": True, "WINDOWED": False, **blocks, **shape}
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    signature |= dict.fromkeys(("tables_ptr", "lengths_ptr", "starts_ptr", "counters_ptr"), "*i32")
    signature |= {"parts_ptr": "*fp32", "scale": "fp32", "window": "i32", "num_tokens": "i32", "num_sequences": "i32"}
    signature |= {argument: "i32:16" for argument in kernel.arg_names if argument.startswith("stride_")}
    return Case(name, kernel, signature, constexprs, {"launch_pdl": True, **options}, expects)


def attention_cases() -> list[Case]:
    """Heads of Llama-3.1-8B, the same in a window, Qwen2.5-0.5B, Phi-2 and Gemma-2-2B."""
    cases = []
    for model, group, dim, windowed in (
        ("llama-8b", 4, 128, False),
        ("llama-8b windowed", 4, 128, True),
        ("qwen-0.5b", 7, 64, False),
        ("phi-2", 1, 80, False),
        ("gemma-2b", 2, 256, False),
    ):
        shape = {"GROUP": group, "HEAD_DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "WINDOWED": windowed}
        decode = attention.decode_blocks(group, dim, torch.bfloat16)
        prefill = attention.prefill_blocks(dim, torch.bfloat16)
        prefill["SEARCH"] = attention.SEARCH
        cases += [
            attention_case(f"decode {model}", attention.decode_kernel, decode, (HMMA, COPY_16), **shape),
            attention_case(f"prefill {model}", attention.prefill_kernel, prefill, (HGMMA, COPY_16), **shape),
        ]
    return cases


KERNELS: list[Case] = [*attention_cases()]


def compiled(case: Case) -> Any:
    """What the JIT would make of the launch."""
    names = case.fn.arg_names
    types = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or types[name].endswith(":16")]
    source = ASTSource(
        fn=case.fn,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=TARGET, options=case.options)


def faults(case: Case) -> list[str]:
    """Compile, print a line of figures, return what is wrong."""
    kernel = compiled(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = read("cuobjdump", "-res-usage", file.name)
        sass = read("nvdisasm", file.name)
    registers, stack = (int(n) for n in re.findall(r"\b(?:REG|STACK):(\d+)", usage)[-2:])
    counts = "  ".join(f"{name} {len(re.findall(pattern, sass)):3}" for name, pattern in COUNTED.items())
    print(f"{case.name:30} registers {registers:3}  stack {stack:3}  shared {kernel.metadata.shared:6}  {counts}")
    wrong = [f"no {pattern}" for pattern in case.expects if not re.search(pattern, sass)]
    if stack or re.search(COUNTED["spill"], sass):
        wrong.append("registers spill")
    return [f"{case.name}: {fault}" for fault in wrong]


def read(tool: str, *args: str) -> str:
    return subprocess.run([BIN / tool, *args], capture_output=True, text=True, check=True).stdout


def main() -> int:
    chosen = [case for case in KERNELS if all(word in case.name for word in sys.argv[1:])]
    wrong = [fault for case in chosen for fault in faults(case)]
    print(*wrong, f"triton {triton.__version__}: {len(chosen)} kernels, {len(wrong)} faults", sep="\n")
    return 1 if wrong or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
