"""Plan: everything that was derived from what the user said and what the machine has."""

import os
from dataclasses import dataclass, replace

import torch

from aiolora.config import EngineArgs
from aiolora.engine.batch import Bucket
from aiolora.engine.kv_cache import page_nbytes
from aiolora.engine.routes import even
from aiolora.errors import ConfigError
from aiolora.lora.kinds import Room
from aiolora.lora.layout import Layout
from aiolora.models.model import ModelConfig
from aiolora.ops.linear import RANKS_PER_PAGE
from aiolora.ops.registration import has_kernels

PAGE_SIZE = 16
_CPU_SHARE = 0.25  # of the machine's memory for the KV cache, at most
_CPU_KV_LIMIT = 4 << 30
_GPU_LORA_SHARE = 0.1  # of what the weights leave free
_EXPERTS_SHARE = 1 / 3  # of the same, or of a CPU's memory: a rank of all experts is large
_GPU_ENDS_SHARE = 1 / 64  # of the same: few adapters change the embedding or the head
_CPU_ENDS_SHARE = 1 / 16
_GRAPHS_NBYTES = 1 << 30  # kept free for CUDA graphs
_GRAPH_SIZES = (1, 2, 4, *range(8, 48, 8), 12, 48, 56, *range(64, 128, 16), *range(128, 256, 32))  # and every 64th
# (tokens, sequences) of steps with prompts: the host takes longer than the device for as many, or more
_PROMPT_SIZES = (
    *((size, (16,)) for size in (32, 64, 128, 192)),
    *((size, (16, min(256, size // 2))) for size in (256, 384, 512, 768)),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the stores and bounds of a step."""

    device: str
    weights_nbytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    kv_nbytes: int
    adapter_room: Room
    adapter_nbytes: int
    lora_pages: int  # W of a step on a GPU, unless several adapters of one token take more
    graph_buckets: tuple[Bucket, ...]  # steps to be captured; none on the CPU


def pick_device(said: str) -> str:
    """`auto` is the GPU where there is one."""
    if said == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no GPU; use device='cpu' or a CUDA build of torch")
    if said == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return said


def step_bounds(args: EngineArgs, config: ModelConfig, device: str) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens). Raises `ConfigError` where they do not fit together."""
    usual_seqs, usual_tokens = (256, 8192) if device == "cuda" else (32, 1024)
    max_num_seqs = args.max_num_seqs or min(usual_seqs, args.max_num_batched_tokens or usual_seqs)
    budget = args.max_num_batched_tokens or max(usual_tokens, max_num_seqs)
    if budget < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={budget} is under max_num_seqs={max_num_seqs}: a step must fit one token of each"
        )
    if not args.enable_chunked_prefill and budget < config.max_positions:
        raise ConfigError(
            f"enable_chunked_prefill=False needs max_num_batched_tokens >= max_model_len={config.max_positions}, "
            f"not {budget}"
        )
    return max_num_seqs, budget


def make_plan(
    args: EngineArgs,
    config: ModelConfig,
    layout: Layout | None,
    dtype: torch.dtype,
    device: str,
    *,
    weights: int = 0,
    activations: int = 0,
    capturable: bool = True,
) -> Plan:
    """Size everything, with the weights in place and no store yet. `weights`: their bytes; `activations`: bytes that a
    step takes on a GPU.

    Raises `ConfigError` where the wishes do not fit together or into the memory.
    """
    max_num_seqs, budget = step_bounds(args, config, device)
    adapter_room = _adapter_room(args, layout, device)
    adapter_nbytes = layout.pages_nbytes(dict(enumerate(adapter_room.pages(layout.page_kinds)))) if layout else 0
    on_gpu = device == "cuda"
    lora_pages = even(-(-args.max_lora_rank // RANKS_PER_PAGE)) if layout and on_gpu else 0
    captured = capturable and on_gpu and not args.enforce_eager and has_kernels()
    graphs = graph_buckets(max_num_seqs, budget, args.max_loras, lora_pages) if captured else ()
    page = page_nbytes(config, PAGE_SIZE, dtype)
    pages_of_one = -(-config.max_positions // PAGE_SIZE)
    logits = 4 * 4 * max_num_seqs * config.vocab_size  # in float32, as often as sampling needs them
    taken = adapter_nbytes + activations + logits + (_GRAPHS_NBYTES if graphs else 0)
    memory = args.kv_cache_memory or _kv_memory(args, device, taken, wish=page * pages_of_one * max_num_seqs)
    num_pages = memory // page
    if num_pages < pages_of_one:
        raise ConfigError(
            f"the KV cache of {memory / 2**20:.1f} MiB holds {num_pages * PAGE_SIZE} tokens, fewer than "
            f"max_model_len={config.max_positions}; lower --max-model-len or raise --kv-cache-memory"
        )
    return Plan(
        device=device,
        weights_nbytes=weights,
        max_model_len=config.max_positions,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        kv_nbytes=num_pages * page,
        adapter_room=adapter_room,
        adapter_nbytes=adapter_nbytes,
        lora_pages=lora_pages,
        graph_buckets=graphs,
    )


def _adapter_room(args: EngineArgs, layout: Layout | None, device: str) -> Room:
    """Pages for `max_loras` adapters of the largest rank, or rank pages of `lora_memory`, and those of the ends.

    On a GPU as many more rank pages as host memory keeps, within a share of what is free. Routed experts have as many
    pages as the linears where `lora_memory` is said, else within a share. Vector pages are a few parts in a hundred of
    it: one of each kind for each of `max_loras`, beside `lora_memory`. `--lora-target-modules` may leave no linears, or
    the ends alone.
    """
    if layout is None:
        return Room(0)
    kinds = layout.page_kinds
    page, of_experts = (sum(map(layout.page_nbytes, some)) for some in (kinds.linears, kinds.experts))
    one = -(-args.max_lora_rank // RANKS_PER_PAGE)
    pages = experts = args.max_loras * one
    if args.lora_memory is not None and page + of_experts:
        pages = experts = args.lora_memory // (page + of_experts)
    else:
        free = torch.cuda.mem_get_info()[0] if device == "cuda" else _machine_memory()
        if device == "cuda" and page:
            pages = max(pages, min(int(free * _GPU_LORA_SHARE) // page, args.host_adapters * one))
        if of_experts:
            experts = min(experts, int(free * _EXPERTS_SHARE) // of_experts)
    if pages < one:
        raise ConfigError(
            f"lora_memory={args.lora_memory} holds rank {pages * RANKS_PER_PAGE}, under max_lora_rank="
            f"{args.max_lora_rank}; one such adapter needs {one * (page + of_experts)} bytes"
        )
    ends, blocks = _ends_room(args, layout, device, args.max_loras * one)
    return Room(pages, args.max_loras, ends, blocks, experts if of_experts else 0)


def _ends_room(args: EngineArgs, layout: Layout, device: str, ranks: int) -> tuple[int, int]:
    """(rank pages of embedding and head each, pages of blocks) of `lora_ends_memory`.

    By default room for `max_loras` adapters that change all they can, `ranks` pages each, within a share of the memory
    (on a CPU it is not taken before it is written to). Rank pages have half of it at most: blocks may take the rest.
    """
    kinds, most = layout.page_kinds, args.max_loras * layout.most_blocks
    page, block = sum(map(layout.page_nbytes, kinds.ends)), layout.page_nbytes(kinds.blocks)
    memory = args.lora_ends_memory
    if memory is None:
        on_gpu = device == "cuda"
        share = torch.cuda.mem_get_info()[0] * _GPU_ENDS_SHARE if on_gpu else _machine_memory() * _CPU_ENDS_SHARE
        memory = min(int(share), ranks * page + most * block)
    pages = min(ranks, memory // 2 // page) if page else 0
    return pages, min(most, (memory - pages * page) // block)


def graph_buckets(
    max_num_seqs: int, max_num_batched_tokens: int, max_loras: int, lora_pages: int
) -> tuple[Bucket, ...]:
    """Each size without adapters and, where there are any, with as many of the largest rank as a step may have.

    First single tokens of up to all sequences; then steps with prompts, of `max_num_batched_tokens` at most.
    """
    sizes = sorted({*_GRAPH_SIZES, *range(256, max_num_seqs, 64), max_num_seqs})
    shapes = [(size, size) for size in sizes if size <= max_num_seqs]
    for tokens, most in _PROMPT_SIZES:
        shapes += [(tokens, min(some, max_num_seqs)) for some in most if tokens <= max_num_batched_tokens]
    plain = [Bucket(*shape) for shape in dict.fromkeys(shapes)]
    return (*plain, *(replace(one, mixes=min(one.tokens, max_loras), pages=lora_pages) for one in plain if lora_pages))


def _kv_memory(args: EngineArgs, device: str, taken: int, *, wish: int) -> int:
    """Bytes for the KV cache: never more than all sequences at full length could use. `taken`: not there yet (GPU)."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return min(wish, max(0, int(total * args.gpu_memory_utilization) - (total - free) - taken))
    return min(wish, int(_machine_memory() * _CPU_SHARE), _CPU_KV_LIMIT)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
