"""Compile the kernels for Hopper without a GPU and read what came out: `make kernels`.

Each case is a launch of production. It fails where registers spill to memory or an instruction that the kernel's speed
rests on is missing.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aiolora.ops.kernels import attention
from tests.kernels.launches import GPT_OSS, Launch, Step, launches

TARGET = GPUTarget("cuda", 90, 32)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HMMA, HGMMA, COPY_16 = r"\bHMMA\.", r"\bHGMMA\.", r"\bLDGSTS\S*\.128"
LOAD_8, LOAD_16 = r"\bLDG\.\S*\b64", r"\bLDG\.\S*128"
COUNTED = {"HMMA": HMMA, "HGMMA": HGMMA, "LDGSTS.128": COPY_16, "LDG.128": LOAD_16, "spill": r"\b(STL|LDL)\b"}
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass(frozen=True)
class Case:
    """A launch: types of its arguments by name, as "*bf16", "fp32", "i32", or "i32:16" for a multiple of 16."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    expects: tuple[str, ...] = ()


def attention_case(
    name: str, kernel: Any, blocks: dict[str, int], expects: tuple[str, ...], sinks: bool, **shape: Any
) -> Case:
    options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
    constexprs = {"PAGE": 16, "PDL": True, "WINDOWED": False, "CAP": 0.0, **blocks, **shape}
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    signature |= dict.fromkeys(("tables_ptr", "lengths_ptr", "starts_ptr", "counters_ptr"), "*i32")
    if sinks:
        signature["sinks_ptr"] = "*fp32"
    else:
        constexprs["sinks_ptr"] = None
    signature |= {"parts_ptr": "*fp32", "scale": "fp32", "window": "i32", "num_tokens": "i32", "num_sequences": "i32"}
    signature |= {argument: "i32:16" for argument in kernel.arg_names if argument.startswith("stride_")}
    return Case(name, kernel, signature, constexprs, {"launch_pdl": True, **options}, expects)


def attention_cases() -> list[Case]:
    """Heads of Llama-3.1-8B, the same in a window, Qwen2.5-0.5B, Phi-2, Gemma-2-2B and gpt-oss-20b."""
    cases = []
    for model, group, dim, windowed in (
        ("llama-8b", 4, 128, False),
        ("llama-8b windowed", 4, 128, True),
        ("qwen-0.5b", 7, 64, False),
        ("phi-2", 1, 80, False),
        ("gemma-2b", 2, 256, False),
        ("gemma-2b capped", 2, 256, True),
        ("gpt-oss sunk", 8, 64, False),
        ("gpt-oss windowed sunk", 8, 64, True),
    ):
        shape = {"GROUP": group, "HEAD_DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "WINDOWED": windowed}
        shape["CAP"] = 50.0 if model.endswith("capped") else 0.0
        decode = attention.decode_blocks(group, dim, torch.bfloat16)
        prefill = attention.prefill_blocks(dim, torch.bfloat16)
        prefill["SEARCH"] = attention.SEARCH
        sinks = model.endswith("sunk")
        cases += [
            attention_case(f"decode {model}", attention.decode_kernel, decode, (HMMA, COPY_16), sinks, **shape),
            attention_case(f"prefill {model}", attention.prefill_kernel, prefill, (HGMMA, COPY_16), sinks, **shape),
        ]
    return cases


def launch_case(name: str, launch: Launch, expects: tuple[str, ...]) -> Case:
    """With what the JIT would compile it for: ones and None as constants, multiples of 16 known to be some."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for param in launch.function.params:
        value, free = launch.arguments[param.name], param.do_not_specialize
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            constexprs[param.name] = value
        elif isinstance(value, Tensor):
            signature[param.name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if free or value % 16 else "i32:16"
    return Case(name, launch.function, signature, constexprs, launch.options, expects)


def launch_cases(name: str, call: Callable[[], object], *expects: tuple[str, ...], pdl: bool = True) -> list[Case]:
    """A case for each launch of `call`, with what each has to contain."""
    found = launches(call, pdl=pdl)
    return [
        launch_case(f"{name} {launch.function.__name__}", launch, words)
        for launch, words in zip(found, expects, strict=True)
    ]


def step_cases() -> list[Case]:
    """Every kernel beside attention, as cut for few and many tokens; rank 16."""
    one, few, some, many, most = (Step(tokens) for tokens in (1, 16, 64, 128, 512))
    narrow, wide = (HMMA, COPY_16), (HGMMA, COPY_16)  # 16 rows; 64
    return [
        *launch_cases("product o 1", lambda: one.product("o"), narrow),
        *launch_cases("product o 16", lambda: few.product("o"), wide),
        *launch_cases("product qkv 16", lambda: few.product("qkv"), wide),
        *launch_cases("product gate_up 1", lambda: one.product("gate_up"), wide),
        *launch_cases("product gate_up 64", lambda: some.product("gate_up"), wide),
        *launch_cases("product o 64", lambda: some.product("o"), wide),
        *launch_cases("shrink ahead o 1", lambda: one.product_shrink("o"), narrow, narrow),
        *launch_cases("shrink ahead qkv 16", lambda: few.product_shrink("qkv"), narrow, wide),
        *launch_cases("shrink beside o 1", lambda: one.product_shrink("o"), narrow, pdl=False),
        *launch_cases("shrink beside gate_up 16", lambda: few.product_shrink("gate_up"), wide, pdl=False),
        *launch_cases("shrink qkv 128", lambda: many.product_shrink("qkv"), narrow),
        *launch_cases("shrink qkv 512", lambda: most.product_shrink("qkv"), wide),
        *launch_cases("complete 128", many.complete, (HMMA, LOAD_16)),
        *launch_cases("complete 512", most.complete, (HGMMA, LOAD_16)),
        *launch_cases("rms_norm 1", one.rms_norm, (LOAD_16,)),
        *launch_cases("add_norm 1", lambda: one.add_norm(False), (LOAD_16,)),
        *launch_cases("add_norm owing 64", lambda: some.add_norm(True), (LOAD_16,)),
        *launch_cases("joined 1", lambda: one.joined(False), (LOAD_16,)),
        *launch_cases("joined owing 64", lambda: some.joined(True), (LOAD_16,)),
        *launch_cases("silu_mul 1", lambda: one.silu_mul(False), (LOAD_8,)),
        *launch_cases("silu_mul 64", lambda: some.silu_mul(False), (LOAD_16,)),
        *launch_cases("silu_mul owing 1", lambda: one.silu_mul(True), (LOAD_16,)),
        *launch_cases("silu_mul owing 64", lambda: some.silu_mul(True), (LOAD_16,)),
        *launch_cases("silu_mul owing 128", lambda: many.silu_mul(True), (HMMA, LOAD_16)),
        *launch_cases("silu_mul owing 512", lambda: most.silu_mul(True), (HGMMA, LOAD_16)),
        *launch_cases("gelu_mul fused 64", lambda: some.gelu_mul(False), (LOAD_16,)),
        *launch_cases("gelu_mul fused owing 64", lambda: some.gelu_mul(True), (LOAD_16,)),
        *launch_cases("gelu_mul fused owing 512", lambda: most.gelu_mul(True), (HGMMA, LOAD_16)),
        *launch_cases("rope_store partly 64", lambda: some.rope_store(False, turned=96), ()),
        *launch_cases("rope_store partly owing 512", lambda: most.rope_store(True, turned=96), (HGMMA,)),
        *launch_cases("rope_store 1", lambda: one.rope_store(False), ()),
        *launch_cases("rope_store 16", lambda: few.rope_store(False), (LOAD_16,)),
        *launch_cases("rope_store owing 1", lambda: one.rope_store(True), (LOAD_16,)),
        *launch_cases("rope_store owing 64", lambda: some.rope_store(True), (LOAD_16,)),
        *launch_cases("rope_store owing 128", lambda: many.rope_store(True), (HMMA, LOAD_16)),
        *launch_cases("rope_store owing 512", lambda: most.rope_store(True), (HGMMA, LOAD_16)),
        *launch_cases("gate 16", lambda: few.gate(False), ()),
        *launch_cases("gate owing 16", lambda: few.gate(True), (HMMA,)),
        *launch_cases("gate 512", lambda: most.gate(False), (), (), ()),
        *launch_cases("gated experts 16", lambda: few.gated_experts(False), narrow),
        *launch_cases("gated experts owing 16", lambda: few.gated_experts(True), (LOAD_16,), narrow),
        *launch_cases("gated experts 512", lambda: most.gated_experts(False), wide),
        *launch_cases("gated experts owing 512", lambda: most.gated_experts(True), wide, wide),
        *launch_cases("summed experts 16", lambda: few.summed_experts(False), narrow, ()),
        *launch_cases("summed experts owing 16", lambda: few.summed_experts(True), (LOAD_16,), narrow, ()),
        *launch_cases("summed experts 512", lambda: most.summed_experts(False), wide, ()),
        *launch_cases("summed experts owing 512", lambda: most.summed_experts(True), wide, wide, ()),
        *launch_cases("gate biased 16", lambda: few.gate(False, GPT_OSS), ()),
        *launch_cases("gate biased owing 512", lambda: most.gate(True, GPT_OSS), (HGMMA,), (), (), ()),
        *launch_cases("gated experts limited 16", lambda: few.gated_experts(False, GPT_OSS), narrow),
        *launch_cases("gated experts limited owing 16", lambda: few.gated_experts(True, GPT_OSS), (LOAD_16,), narrow),
        *launch_cases("gated experts limited 512", lambda: most.gated_experts(False, GPT_OSS), wide),
        *launch_cases("gated experts limited owing 512", lambda: most.gated_experts(True, GPT_OSS), (LOAD_16,), wide),
        *launch_cases("summed experts biased 16", lambda: few.summed_experts(False, GPT_OSS), narrow, ()),
        *launch_cases(
            "summed experts biased owing 512", lambda: most.summed_experts(True, GPT_OSS), (LOAD_16,), wide, ()
        ),
        *launch_cases("embed", few.embed, (LOAD_16,)),
        *launch_cases("own_logits 16", few.own_logits, (HMMA, COPY_16)),
        *launch_cases("own_logits 512", most.own_logits, (HGMMA, COPY_16)),
        *launch_cases("greedy", few.greedy, (LOAD_16,), ()),
        *launch_cases("report", few.report, (LOAD_16,), ()),
        *launch_cases("sample", few.sample, (LOAD_16,), (COPY_16,)),
    ]


KERNELS: list[Case] = [*attention_cases(), *step_cases()]


def compiled(case: Case) -> Any:
    """What the JIT would make of the launch."""
    names = case.fn.arg_names
    types = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    pointers = [p.name for p in case.fn.params if types[p.name][0] == "*" and not p.do_not_specialize_on_alignment]
    aligned = [i for i, name in enumerate(names) if name in pointers or types[name].endswith(":16")]
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
    print(f"{case.name:42} registers {registers:3}  stack {stack:3}  shared {kernel.metadata.shared:6}  {counts}")
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
