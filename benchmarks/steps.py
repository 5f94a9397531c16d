"""Where a decode step's time goes: kernels by kind, against the bytes that the step has to read.

    python -m benchmarks.steps --model llama-3.1-8b --cases 1/0,1/1,32/0,32/32 --out results

A case is sequences/adapters. The step is timed without the profiler; the profiler's kernels are then sorted by name.
Kernels that overlap count once in "busy" and in full in their group; "gaps" is the step less "busy". A and B of the
adapters are floors of the shrink and of the reads of partials; kernels that do a whole linear count as base products.
Without a GPU the profiler sees operators.
"""

import csv
import re
from collections import Counter, defaultdict

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import DeviceType, ProfilerActivity, profile

from benchmarks.command import arguments, parse
from benchmarks.harness import machine
from benchmarks.session import Session
from benchmarks.shapes import SHAPES
from benchmarks.steady import BANDWIDTH, Steady, decoding
from benchmarks.workloads import Ours

# group -> what the name of a kernel (or, on a CPU, of an operator) matches; the first that does
GROUPS = (
    ("copies", r"Memcpy|Memset|aten::(copy_|to|_to_copy|fill_|zero_|index|cat)"),
    ("attention", r"attention|decode_kernel|prefill_kernel|flash|fmha"),
    ("LoRA shrink", r"shrink"),
    ("base products", r"nvjet|gemm|gemv|cutlass|xmma|splitKreduce|skinny|product|whole_linear|aten::(linear|mm|addmm)"),
    ("reads of partials", r"add_norm|silu_mul|rope_store|complete|norm_after|stored|gated"),
    ("norms, embedding", r"norm|embed"),
    (
        "sampling",
        r"sampl|greedy|report|argmax|ArgMax|logsumexp|softmax|topk|statistics|draw|least_kept|_combine|reduce|penal|gather",
    ),
)


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")


def busy_us(spans: list[tuple[float, float]]) -> float:
    """Length of the union of [start, end) spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kernels(steady: Steady, steps: int) -> list[FunctionEvent]:
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        steady.step(steps)
        if on_gpu:
            torch.cuda.synchronize()
    events: list[FunctionEvent] = profiler.events()
    if on_gpu:
        found = [event for event in events if event.device_type == DeviceType.CUDA]
        return [event for event in found if not event.name.startswith(("ProfilerStep", "gpu_user", "Activity"))]
    return [event for event in events if event.cpu_parent is None]


def measure(session: Session, ours: Ours, streams: int, adapters: int, steps: int, length: int) -> list[list[str]]:
    shape = SHAPES[ours.model]
    known = ours.adapters(adapters) if adapters else []
    loras = [known[number % adapters] if adapters else None for number in range(streams)]
    with decoding(session, loras, length=length) as steady:
        took = min(steady.step(steps) for _ in range(3)) / steps * 1e3
        kv = steady.kv_tokens() * shape.kv_nbytes
        events = kernels(steady, steps)
        session.keep(steady.outputs(), loras)
    check = session.check(2)
    if not check.right:
        ours.failed.append(f"{streams}/{adapters}")
    by_group: Counter[str] = Counter()
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        us = event.time_range.end - event.time_range.start
        by_group[group_of(event.name)] += us
        by_name[event.name].append(us)
    busy = busy_us([(event.time_range.start, event.time_range.end) for event in events]) / steps / 1e3
    floors = {
        "base products": shape.weight_nbytes,
        "attention": kv,
        "LoRA shrink": min(adapters, streams) * shape.a_nbytes(16),
        "reads of partials": min(adapters, streams) * (shape.adapter_nbytes(16) - shape.a_nbytes(16)),
    }
    case = f"{streams}/{adapters}"
    rows = [[case, "step", f"{took:.3f}", f"{sum(floors.values()) / BANDWIDTH * 1e3:.3f}", ""]]
    counts = Counter(group_of(event.name) for event in events)
    for group in [*(name for name, _ in GROUPS), "other"]:
        if by_group[group] or floors.get(group):
            floor = f"{floors[group] / BANDWIDTH * 1e3:.3f}" if floors.get(group) else ""
            rows.append([case, group, f"{by_group[group] / steps / 1e3:.3f}", floor, f"{counts[group] / steps:.0f}"])
    rows.append([case, "busy", f"{busy:.3f}", "", f"{len(events) / steps:.0f}"])
    rows.append([case, "gaps", f"{took - busy:.3f}", "", ""])
    print(f"\n# {streams} sequences, {adapters} adapters: {check}")
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:16]:
        share = f"{sum(times) / steps / 1e3:7.3f} ms {len(times) / steps:6.1f} x {sum(times) / len(times):8.2f} us"
        print(f"  {share}  {group_of(name):18} {name[:90]}")
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", default="1/0,1/1,32/0,32/1,32/32,256/0,256/32", help="sequences/adapters, ...")
    parser.add_argument("--steps", type=int, default=20, help="steps under the profiler")
    parser.add_argument("--length", type=int, default=256, help="tokens of each prompt")
    args = parse(parser)
    ours = Ours(args.model, args.adapters_dir, dtype=args.dtype)
    rows: list[list[str]] = []
    for case in args.cases.split(","):
        streams, adapters = map(int, case.split("/"))
        rows += measure(ours.shared, ours, streams, adapters, args.steps, args.length)
    head = ["case", "what", "ms a step", "floor ms", "kernels"]
    with (args.out / "steps.csv").open("w", newline="") as stream:
        stream.write(f"# {machine()}, {args.model}, {args.dtype}\n")
        csv.writer(stream).writerows([head, *rows])
    print(f"\n{machine()}")
    for row in [head, *rows]:
        print(f"{row[0]:10} {row[1]:20} {row[2]:>10} {row[3]:>10} {row[4]:>8}")
    if ours.failed:
        raise SystemExit(f"WRONG: {', '.join(ours.failed)}")


if __name__ == "__main__":
    main()
