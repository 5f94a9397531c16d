"""Starting an engine in front of somebody: a bar while weights and graphs come, then where the memory went."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from aiolora.config import EngineArgs
from aiolora.types import AdapterPolicy, LoRARequest

if TYPE_CHECKING:
    from aiolora.engine.async_engine import AsyncLLMEngine
    from aiolora.engine.plan import Plan


@asynccontextmanager
async def started(
    args: EngineArgs,
    modules: Sequence[LoRARequest],
    *,
    policies: Mapping[str, AdapterPolicy] | None = None,
    quiet: bool = False,
) -> AsyncIterator["AsyncLLMEngine"]:
    """An engine that knows `modules`, stopped afterwards: each is checked now, and read when first asked for.

    `policies`: what adapters may take, by name. Tells on stderr; `quiet`: only bars, and on a terminal.
    """
    from aiolora.engine.async_engine import AsyncLLMEngine

    console = Console(stderr=True, highlight=False)
    began = time.perf_counter()
    if not quiet:
        console.print(f"loading {args.model} ...")
    engine = AsyncLLMEngine.from_engine_args(args)
    with _bar(console) as bar:
        await engine.start(_Bars(bar).report)
    async with engine:
        took = time.perf_counter() - began
        for module in modules:
            await engine.announce_lora(module, policy=(policies or {}).get(module.lora_name))
        if not quiet:
            console.print(memory_table(engine.plan, args))
            known = f"{len(modules)} adapters known" if modules else "no adapters"
            console.print(f"{args.model} on {engine.plan.device}, loaded in {took:.1f} s; {known}")
        yield engine


def memory_table(plan: "Plan", args: EngineArgs) -> Table:
    """What takes how much, and the flag that changes it."""
    table = Table("memory", "MiB", "holds", "to change it", title=None)
    tokens = plan.num_pages * plan.page_size
    at_once = tokens / plan.max_model_len
    table.add_row("weights", _mib(plan.weights_nbytes), "the base model", "--dtype")
    if plan.adapter_nbytes:
        holds = f"{plan.adapter_room.layers} pages of 8 ranks; up to {args.max_loras} adapters a step"
        table.add_row("adapters", _mib(plan.adapter_nbytes), holds, "--lora-memory, --max-loras, --max-lora-rank")
    holds = f"{tokens:,} tokens: {at_once:.1f} answers of the whole context of {plan.max_model_len:,}"
    change = "--gpu-memory-utilization" if plan.device == "cuda" else "--kv-cache-memory"
    table.add_row("KV cache", _mib(plan.kv_nbytes), holds, f"{change}, --max-model-len")
    step = f"{plan.max_num_seqs} answers, {plan.max_num_batched_tokens:,} tokens"
    table.add_row("a step", "", step, "--max-num-seqs, --max-num-batched-tokens")
    return table


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f}"


def _bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class _Bars:
    """A bar for each thing that is reported. Called in the thread that loads."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def report(self, what: str, done: int, of: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=of)
        self._bar.update(self._tasks[what], completed=done)
