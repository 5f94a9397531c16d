"""The workloads of the GPU page, each a function from an `Ours` to rows of its table.

W1, W2: 512 requests in 512 out 128. W3: 256 in 128 out 256. W4: one stream in 128 out 256. W5: 32 such streams.
W7: 512 in 128 out 128 over 128 adapters, zipf 1.0. Greedy, every answer to its full length, no prefix met twice.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from aiolora import LoRARequest
from benchmarks.adapters import make_adapters
from benchmarks.session import Loras, Session
from benchmarks.shapes import SHAPES, make_model


@dataclass
class Row:
    """A line of the table. `bar`, `stretch`, `peer`: on an H200 with Llama-3.1-8B, as text."""

    name: str
    value: float
    unit: str
    bar: str = ""
    stretch: str = ""
    peer: str = ""  # vLLM 0.25.1, its best flags
    check: str = ""


@dataclass
class Ours:
    """What the workloads share: folders, sizes, the engine that most of them use."""

    model: str
    root: Path
    scale: float = 1.0  # of all counts and lengths, for a machine without a GPU
    dtype: str = "bfloat16"
    failed: list[str] = field(default_factory=list)
    _session: Session | None = None

    def engine(self, *, rank: int = 16, loras: int = 32, **args: object) -> Session:
        """A new engine with LoRA."""
        return self.plain(enable_lora=True, max_loras=loras, max_lora_rank=rank, **args)

    def plain(self, **args: Any) -> Session:
        self.close()
        session = Session(str(make_model(self.root, self.model)), self.model, dtype=self.dtype, **args)
        print(f"# engine started in {session.start_s:.1f} s: {args}", flush=True)
        return session

    @property
    def shared(self) -> Session:
        """The engine of the peer's measurements: 32 adapters of rank 16 at a time, 256 sequences."""
        if self._session is None:
            session = self.engine(max_cpu_loras=160)
            self._session = session
            session.run(self.cycle(self.adapters(32), 32), 16, 4)  # all are read
            session.run([None] * 4, 16, 4)
        return self._session

    def close(self) -> None:
        """Give the shared engine's memory back."""
        self._session = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def adapters(self, count: int, *, rank: int = 16) -> list[LoRARequest]:
        return make_adapters(self.root, self.model, count, rank=rank)

    def cycle(self, adapters: list[LoRARequest], count: int) -> list[LoRARequest | None]:
        return [adapters[number % len(adapters)] for number in range(count)]

    def count(self, number: int) -> int:
        return max(2, round(number * self.scale))

    def row(self, session: Session, row: Row) -> Row:
        """`row` with a check of the run it came from."""
        check = session.check()
        row.check = str(check)
        if not check.right:
            self.failed.append(row.name)
        return row


def w4(ours: Ours) -> list[Row]:
    session, (one,) = ours.shared, ours.adapters(1)
    out = ours.count(256)
    base = session.step_ms([None], outputs=out)
    rows = [ours.row(session, Row("W4 1 stream, base", base, "ms", "4.7", "4.3", "4.99"))]
    lora = session.step_ms([one], outputs=out)
    return [*rows, ours.row(session, Row("W4 1 stream, LoRA", lora, "ms", "5.0", "4.4", "5.93"))]


def w5(ours: Ours) -> list[Row]:
    session, out, streams = ours.shared, ours.count(256), min(32, ours.count(32))
    mixes: list[tuple[str, Loras, tuple[str, str, str]]] = [
        ("base", [None] * streams, ("5.3", "4.9", "5.60")),
        ("32 adapters", ours.cycle(ours.adapters(32), streams), ("6.5", "5.7", "16.57")),
        ("1 adapter", ours.cycle(ours.adapters(1), streams), ("5.6", "5.0", "6.47")),
    ]
    rows = []
    for name, loras, others in mixes:
        took = session.step_ms(loras, outputs=out)
        rows.append(ours.row(session, Row(f"W5 32 streams, {name}", took, "ms", *others)))
    return rows


def w1(ours: Ours) -> list[Row]:
    return [_pace(ours, "W1 512 in 512 out 128, base", [None], 512, 512, 128, ("7,000", "7,800", "6,736"))]


def w2(ours: Ours) -> list[Row]:
    name, many, one = "W2 512 in 512 out 128,", ours.adapters(32), ours.adapters(1)
    return [
        _pace(ours, f"{name} 32 adapters", many, 512, 512, 128, ("6,300", "7,400", "3,873")),
        _pace(ours, f"{name} 1 adapter", one, 512, 512, 128, ("", "", "4,773")),
    ]


def w3(ours: Ours) -> list[Row]:
    name, many = "W3 256 in 128 out 256,", ours.adapters(32)
    return [
        _pace(ours, f"{name} base", [None], 256, 128, 256, ("18,000", "20,000", "17,668")),
        _pace(ours, f"{name} 32 adapters", many, 256, 128, 256, ("15,000", "18,500", "9,091")),
    ]


def _pace(
    ours: Ours, name: str, adapters: Loras, requests: int, inputs: int, outputs: int, others: tuple[str, str, str]
) -> Row:
    session, requests, outputs = ours.shared, ours.count(requests), ours.count(outputs)
    loras = [adapters[number % len(adapters)] for number in range(requests)]
    session.run(loras[:32], inputs, 4)
    return ours.row(session, Row(name, session.pace(loras, inputs, outputs), "tokens/s", *others))


def w7(ours: Ours) -> list[Row]:
    """128 adapters: with device room for 32 of them, so that they churn, and with the room that there is."""
    count, requests, out = ours.count(128), ours.count(512), ours.count(128)
    adapters = ours.adapters(count)
    weight = 1 / numpy.arange(1, count + 1)
    drawn = numpy.random.default_rng(0).choice(count, requests, p=weight / weight.sum())
    loras: Loras = [adapters[number] for number in drawn]
    slots = min(32, count)
    room = slots * SHAPES[ours.model].adapter_nbytes(16) * (2 if ours.dtype == "float32" else 1)
    rows = []
    for name, args in (("room for 32", {"lora_memory": room}), ("room as there is", {})):
        session = ours.engine(max_cpu_loras=max(slots, count), loras=slots, **args)
        session.run([None] * 4, 16, 4)
        bars = (("9,000", "", "2,742"), ("13,000", "no visible churn", "4,087"))
        for state, others in zip(("cold", "warm"), bars):
            pace = session.pace(loras, 128, out, repeat=1)
            rows.append(ours.row(session, Row(f"W7 128 adapters, {name}, {state}", pace, "tokens/s", *others)))
        even = session.pace([None] * requests, 128, out, repeat=1)
        rows.append(Row(f"W7's requests on the base, {name}", even, "tokens/s"))
        del session
    return rows


def new(ours: Ours) -> list[Row]:
    """The first token of an adapter that is new, or on the host only, beyond a resident one's."""
    count, times = 48, 8
    adapters = ours.adapters(count)
    slots = 16
    room = slots * SHAPES[ours.model].adapter_nbytes(16) * (2 if ours.dtype == "float32" else 1)
    session = ours.engine(loras=slots, max_cpu_loras=count, lora_memory=room)
    for lora in adapters:  # into the page cache, whoever wrote them
        (Path(lora.lora_path) / "adapter_model.safetensors").read_bytes()
    session.run([None], 128, 2)
    early, fresh = adapters[:-times], adapters[-times:]
    for lora in early:
        session.run([lora], 128, 1)

    def first(loras: list[LoRARequest]) -> float:
        return statistics.median(session.run([lora], 128, 1) for lora in loras) * 1e3

    def resident() -> set[str]:
        return {label.partition("@")[0] for label in session.llm.engine.snapshot().resident_adapters}

    here = [early[-1]] * (2 * times)
    known = first(here)
    evicted = [lora for lora in early if lora.lora_name not in resident()][:times]
    from_host = first(evicted)
    from_disk = first(fresh)
    host = Row("first token from host memory, beyond a resident one's", from_host - known, "ms", "3")
    session.run(evicted, 128, 64)  # few tokens say too little to hold against the reference
    host = ours.row(session, host)
    session.run(fresh, 128, 64)
    peer = Row("first token from page cache, beyond a resident one's", from_disk - known, "ms", "20", "hidden", "137")
    rows = [Row("first token of a resident adapter", known, "ms"), host, ours.row(session, peer)]
    read, copied = zip(*(_alone(session, lora) for lora in fresh))
    rows.append(Row("floor from host memory: its bytes to the device, nothing else", min(copied), "ms"))
    return [*rows, Row("reading, checking and laying out alone", statistics.median(read), "ms")]


def _alone(session: Session, lora: LoRARequest) -> tuple[float, float]:
    """Milliseconds to bring an adapter from the page cache into host memory, and from there to the device."""
    start = time.perf_counter()
    weights = session.weights_of(lora)
    read = time.perf_counter() - start
    pages = [page for some in (*weights.a.values(), *weights.b.values()) for page in some]
    there = [torch.empty_like(page, device="cuda") for page in pages]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for page, place in zip(pages, there):
        place.copy_(page, non_blocking=True)
    torch.cuda.synchronize()
    return read * 1e3, (time.perf_counter() - start) * 1e3


def ranks(ours: Ours) -> list[Row]:
    """32 rows of ranks 8 to 64 on one engine, against what their bytes predict from the rows of rank 16."""
    session, out, each = ours.engine(rank=64), ours.count(256), 8
    by_rank = {rank: ours.adapters(each, rank=rank) for rank in (8, 16, 32, 64)}
    even = ours.adapters(32)
    mixed: Loras = [by_rank[rank][number] for number in range(each) for rank in by_rank]
    for loras in (even, mixed):
        session.run(loras, 16, 4)
    base = session.step_ms([None] * 32, outputs=out)
    same = session.step_ms(even, outputs=out)
    shape = SHAPES[ours.model]
    share = sum(shape.adapter_nbytes(rank) * each for rank in by_rank) / (32 * shape.adapter_nbytes(16))
    rows = [ours.row(session, Row("32 rows, 32 adapters of rank 16", same, "ms"))]
    took = session.step_ms(mixed, outputs=out)
    rows.append(ours.row(session, Row("32 rows, ranks 8, 16, 32, 64", took, "ms")))
    predicted = base + (same - base) * share
    rows.append(Row("mixed ranks over the prediction of bytes", took / predicted * 100 - 100, "%", "within 15"))
    floor = base + sum(shape.adapter_nbytes(rank) * each for rank in by_rank) / 4.29e12 * 1e3
    return [*rows, Row("mixed ranks: base and their bytes at 4.29 TB/s", floor, "ms")]


def off(ours: Ours) -> list[Row]:
    """Base traffic on an engine with LoRA and on one without, both alive, taken in turns."""
    little: dict[str, Any] = {"kv_tokens": 64 * 1024}  # so that both fit into 80 GB
    room = 32 * SHAPES[ours.model].adapter_nbytes(16) * (2 if ours.dtype == "float32" else 1)
    with_lora, out = ours.engine(lora_memory=room, **little), ours.count(256)
    with_lora.run([None] * 4, 16, 4)
    without = Session(str(make_model(ours.root, ours.model)), ours.model, dtype=ours.dtype, **little)
    streams, prompts = min(32, ours.count(32)), ours.count(16)
    measured: dict[str, Callable[[Session], float]] = {
        "a step, 1 stream": lambda session: session.step_once([None], 128, out),
        f"a step, {streams} streams": lambda session: session.step_once([None] * streams, 128, out),
        f"{prompts} prompts of 512 tokens": lambda session: session.run([None] * prompts, 512, 1) * 1e3,
    }
    rows = []
    for name, measure in measured.items():
        took: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(6):
            for enabled, session in ((True, with_lora), (False, without))[:: 1 if turn % 2 else -1]:
                ms = measure(session)
                if turn > 0:
                    took[enabled].append(ms)
        for session in (with_lora, without):  # one token each says too little to hold against the reference
            session.run([None] * prompts, 512, ours.count(32))
        on, bare = (statistics.median(took[enabled]) for enabled in (True, False))
        rows.append(ours.row(without, Row(f"{name}, LoRA off", bare, "ms")))
        rows.append(ours.row(with_lora, Row(f"{name}, LoRA on, base only", on, "ms")))
        spread = (max(took[False]) - min(took[False])) / bare * 100
        rows.append(Row(f"{name}, on over off (spread of off: {spread:.1f} %)", on / bare * 100 - 100, "%", "1"))
    return rows


def many(ours: Ours) -> list[Row]:
    """256 adapters of rank 8 on the device at once, on an engine that would take ranks up to 256."""
    count = ours.count(256)
    room = count * SHAPES[ours.model].adapter_nbytes(8) * (2 if ours.dtype == "float32" else 1)
    largest = min(256, 8 * count)
    session = ours.engine(rank=largest, loras=count, max_cpu_loras=count, lora_memory=room)
    loras: Loras = ours.adapters(count, rank=8)
    session.run(loras, 16, 2)
    out = ours.count(64)
    took = session.step_ms(loras, inputs=32, outputs=out)
    row = ours.row(session, Row(f"{count} rows, each its own adapter of rank 8", took, "ms"))
    held = len(session.llm.engine.snapshot().resident_adapters)
    base = session.step_ms([None] * count, inputs=32, outputs=out)
    return [
        row,
        Row(f"the same rows on the base (floor of their bytes: {room / 4.29e9:.2f} ms)", base, "ms"),
        Row(f"adapters of rank 8 resident, max_lora_rank={largest}", held, "adapters", str(count)),
    ]


def check(ours: Ours) -> list[Row]:
    """Equal adapters answer alike, different ones differently; log-probabilities token by token."""
    session, adapters = ours.shared, ours.adapters(4)
    twin = LoRARequest("twin", 999_983, adapters[0].lora_path)
    loras: Loras = [adapters[0], twin, *adapters[1:], None] * 2
    prompt = session.prompts(1, 64) * len(loras)
    session.run(loras, 64, ours.count(32), prompts=prompt)
    answers = [output.outputs[0] for output in session.answers]
    texts = [tuple(answer.token_ids[:8]) for answer in answers]
    per_token = [answer.cumulative_logprob / len(answer.token_ids) for answer in answers]
    alike = max(abs(per_token[one] - per_token[other]) for one, other in ((0, 1), (0, 6), (0, 7), (5, 11)))
    different = len({texts[number] for number in (0, 2, 3, 4, 5)})
    rows = [
        ours.row(session, Row("distinct answers of 4 adapters and the base", different, "answers", "5")),
        Row("a copy of an adapter against itself, mean logprob", alike, "nat", "0.05"),
    ]
    if different < 5 or alike > 0.05:
        ours.failed.append("equal or different adapters")
    session.llm.engine.remove_lora("twin")
    return rows


WORKLOADS: dict[str, Callable[[Ours], list[Row]]] = {
    "check": check,
    "W4": w4,
    "W5": w5,
    "W1": w1,
    "W2": w2,
    "W3": w3,
    "off": off,
    "ranks": ranks,
    "new": new,
    "W7": w7,
    "many": many,
}
