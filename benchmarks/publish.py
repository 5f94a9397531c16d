"""From tensors in memory to the first token served with them: what a training loop waits for after every step.

    python -m benchmarks.publish --out results
    python -m benchmarks.publish --model llama-3.1-8b --out results

A name is published again and again (`add_lora(name, tensors=..., config=..., load_inplace=True)`), each time other
tensors, and asked for one token at once; from tensors in host memory and, where there is a GPU, from tensors on it. The
floor is the adapter's bytes copied once, page-locked to the device (on a CPU: memory to memory), in the same run.
"""

import argparse
import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest
from benchmarks.adapters import make_adapters
from benchmarks.command import arguments, parse, tell
from benchmarks.harness import median
from benchmarks.online import Answer, ask, at
from benchmarks.session import reference_of
from benchmarks.shapes import SHAPES, started_on
from benchmarks.stall import Streams

VERSIONS = 4  # published in turn


@dataclass(frozen=True)
class Published:
    """One publish: milliseconds."""

    added: float  # until add_lora returned
    served: float  # until the first token came
    answer: Answer


@dataclass(frozen=True)
class Source:
    """A folder's content, in memory."""

    request: LoRARequest
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @classmethod
    def of(cls, request: LoRARequest, device: str) -> "Source":
        folder = Path(request.lora_path)
        tensors = load_file(folder / "adapter_model.safetensors", device=device)
        return cls(request, tensors, json.loads((folder / "adapter_config.json").read_text()))


async def publish(engine: AsyncLLMEngine, name: str, source: Source, prompt: list[int], outputs: int) -> Published:
    start = time.perf_counter()
    version = await engine.add_lora(name, tensors=source.tensors, config=source.config, load_inplace=True)
    added = time.perf_counter() - start
    answer = await ask(engine, prompt, outputs, name)
    assert answer.output.adapter == version.label, "another version than the one just published has answered"
    return Published(added * 1e3, added * 1e3 + answer.ttft_ms, answer)


def floor_ms(nbytes: int, device: str) -> float:
    """A copy of so many bytes, in one piece."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device == "cuda").fill_(1)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return median(copy, repeat=9, warm=2) * 1e3


async def measure(args: argparse.Namespace) -> None:
    shape = SHAPES[args.model]
    folders = make_adapters(args.adapters_dir, args.model, VERSIONS, rank=args.rank)
    engine_args = EngineArgs(
        **started_on(args.adapters_dir, args.model),  # type: ignore[arg-type]
        max_num_seqs=args.streams + 4,
        max_model_len=2048,
        enable_lora=True,
        max_loras=4,
        max_lora_rank=args.rank,
        max_cpu_loras=8,
        lora_memory=8 * shape.adapter_nbytes(args.rank),
        kv_cache_memory=(args.streams + 4) * 2048 * shape.kv_nbytes,
    )
    rows: list[tuple[str, float, str]] = []
    last: dict[str, Published] = {}
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        device = engine.plan.device
        streams = Streams(engine, shape.vocab, [None] * args.streams)
        prompts = [[300 + number] * 16 for number in range(args.count + 1)]
        places = ["cpu"] if device == "cpu" else ["cpu", "cuda"]
        for place in places:
            sources = [Source.of(request, place) for request in folders]
            name = f"published-from-{place}"
            taken = [
                await publish(engine, name, sources[number % VERSIONS], prompts[number], 1)
                for number in range(args.count)
            ][2:]
            resident = [(await ask(engine, prompt, 1, name)).ttft_ms for prompt in prompts[1:]]
            last[place] = await publish(engine, name, sources[args.count % VERSIONS], prompts[-1], 16)
            for share in (0.5, 0.9):
                at_share = f"tensors on {place}, p{share * 100:g}"
                rows.append((f"add_lora, {at_share}", at([each.added for each in taken], share), "ms"))
                rows.append((f"to the first token, {at_share}", at([each.served for each in taken], share), "ms"))
            rows.append((f"first token of it when it is resident, tensors on {place}, p50", at(resident, 0.5), "ms"))
        await streams.stop()
        nbytes = sum(tensor.nbytes for tensor in sources[0].tensors.values())
        floor = floor_ms(nbytes, device)
        rows.append((f"floor: {nbytes / 1e6:.1f} MB copied once, {nbytes / floor / 1e6:.1f} GB/s", floor, "ms"))
        named = [folders[args.count % VERSIONS]] * len(last)
        check = reference_of(engine, args.model).check([each.answer.output for each in last.values()], named)
    said = f"{args.model}, rank {args.rank}, {args.count} times, {args.streams} streams beside"
    tell(args.out / "publish.csv", said, rows, check)


def main() -> None:
    parser = arguments(__doc__, model="smollm2-135m", dtype=False)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--count", type=int, default=40, help="publishes, of which the first two do not count")
    parser.add_argument("--streams", type=int, default=0, help="streams of the base that run meanwhile")
    asyncio.run(measure(parse(parser)))


if __name__ == "__main__":
    main()
