"""The one place where the engine's objects are made and handed to each other."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import sha256

import torch

from aiolora.config import EngineArgs
from aiolora.engine.ahead import compile_ahead
from aiolora.engine.batch import Packer
from aiolora.engine.core import Ends, Engine
from aiolora.engine.encoding import Encoding
from aiolora.engine.grammar import Grammars, Together
from aiolora.engine.intake import Intake, Limits
from aiolora.engine.kv_cache import KVCache
from aiolora.engine.masks import Masks
from aiolora.engine.phases import Phases
from aiolora.engine.plan import PAGE_SIZE, Plan, make_plan, pick_device, step_bounds
from aiolora.engine.runner import ModelRunner
from aiolora.engine.sampler import Sampler
from aiolora.engine.scheduler import Scheduler, SchedulerLimits
from aiolora.engine.warm_up import activation_nbytes, encoding_nbytes
from aiolora.errors import ConfigError
from aiolora.lora.kinds import PageKinds
from aiolora.lora.layout import Layout, layout_of
from aiolora.lora.loader import AdapterWeights, check_adapter, load_adapter
from aiolora.lora.memory import InMemory
from aiolora.lora.outline import Limits as AdapterLimits
from aiolora.lora.outlines import Outlines
from aiolora.lora.paging import reserve_soon, threads
from aiolora.lora.pool import AdapterPool
from aiolora.lora.registry import AdapterRegistry
from aiolora.lora.residency import Residency
from aiolora.media.reader import MediaReader
from aiolora.models.decoder import Decoder
from aiolora.models.loading import DTYPES, Networks, load_networks, read_config
from aiolora.models.model import Model
from aiolora.models.weights import locate
from aiolora.ops.linear import RANKS_PER_PAGE
from aiolora.ops.registration import has_kernels
from aiolora.pages import PagePool
from aiolora.tokenizer import Tokenizer
from aiolora.types import AdapterVersion, AnnouncedAdapter, LoRARequest, Report, unreported

_log = logging.getLogger(__name__)

READERS = 4  # adapters that a blocking face reads at a time; each is read by several threads
_PINNED_SHARE = 4  # of the machine's memory so small a part is locked from the start, at most


@dataclass(frozen=True)
class Built:
    """An engine and what belongs to it on the caller's side."""

    engine: Engine
    intake: Intake
    grammars: Grammars
    load: Callable[[LoRARequest | InMemory], AdapterWeights]  # blocks; any thread
    check: Callable[[LoRARequest], AnnouncedAdapter]  # likewise
    plan: Plan
    phases: Phases


def build(args: EngineArgs, read_again: Callable[[AdapterVersion], None], report: Report = unreported) -> Built:
    """Load the model and make an engine of it. Blocks for seconds to minutes; touches the device.

    `read_again`: see `Engine`. `report` is called in this thread, for weights and graphs. What took how long is logged.
    Raises `ConfigError` or a `ModelError`.
    """
    phases = Phases()
    device = pick_device(args.device)
    folder = locate(args.model)
    if device == "cuda":  # its context takes a second or two, but not the interpreter
        card = torch.device(device, torch.cuda.current_device())
        threads().submit(lambda: torch.zeros(1, device=card))
    phases.over("device")
    config = read_config(folder)
    phases.over("config")
    tokenizer = Tokenizer(locate(args.tokenizer)) if args.tokenizer else Tokenizer(folder, config=config)
    phases.over("tokenizer")
    ahead: list[Future[bool]] = []

    def outlined(networks: Networks) -> None:
        phases.over("outline")
        if device == "cuda":
            ahead.extend(_meanwhile(networks, args))

    networks = load_networks(args, folder, config, device=device, report=report, outlined=outlined)
    phases.over("weights")
    media = MediaReader.of(folder, args.model, domains=args.allowed_media_domains, max_pixels=args.max_image_pixels)
    defaults = default_mm_loras(args, media)
    model = networks.decoder
    dtype = model.embed.weight.dtype
    layout = None
    if args.enable_lora:
        layout = layout_of(model, _lora_dtype(args, dtype), encoder=networks.encoder, only=args.lora_target_modules)
    grammars = Grammars(tokenizer.json, vocab_size=model.config.vocab_size, eos_token_ids=tokenizer.eos_token_ids)
    grammars.load()  # beside what follows: it holds the GIL for a while, and nobody is served yet
    rehearsed = bool(ahead) and ahead[0].result()
    phases.over("kernels")
    activations = 0
    if device == "cuda":
        bounds = step_bounds(args, model.config, device)
        activations = _activations(args, networks, media, bounds, rehearsed=rehearsed)
    plan = make_plan(
        args,
        model.config,
        layout,
        dtype,
        device,
        weights=networks.nbytes,
        activations=activations,
        capturable=model.capturable,
    )
    pinned = plan.device.startswith("cuda")
    phases.over("sizes")
    engine, runner = _engine(args, networks, layout, plan, tokenizer, media, read_again)
    phases.over("stores")
    if device == "cuda":
        kinds, samples = layout.page_kinds.sites if layout else 0, tuple(media.samples())
        if not rehearsed or networks.encoder is not None:  # an outline has no encoder
            runner.rehearse(plan, kinds=kinds, media=samples)
            phases.over("kernels")
        runner.warm_up(plan, kinds=kinds, media=samples)
        phases.over("steps")
        runner.capture(plan, report)
        phases.over("graphs")
    intake = Intake(
        tokenizer,
        AdapterRegistry(args.model),
        Limits(plan.max_model_len, model.config.vocab_size),
        media,
        model=args.model,
        lora_enabled=args.enable_lora,
        default_mm_loras={modality: request.lora_name for modality, request in defaults.items()},
    )
    full_ends = args.max_loras * -(-args.max_lora_rank // RANKS_PER_PAGE)
    adapter_limits = AdapterLimits(args.max_lora_rank, plan.adapter_room, args.model, full_ends, pinned)
    outlines = None if layout is None else Outlines(layout, adapter_limits)

    def load(request: LoRARequest | InMemory) -> AdapterWeights:
        assert outlines is not None, "Intake lets no adapter through where LoRA is off"
        weights = load_adapter(request, outlines)
        if weights.folder is not None:
            intake.tokenizers.read(weights.version, weights.folder)
        return weights

    def check(request: LoRARequest) -> AnnouncedAdapter:
        assert outlines is not None, "Intake lets no adapter through where LoRA is off"
        return check_adapter(request, outlines)

    for request in defaults.values():
        intake.registry.announce(check(request))
    phases.over("rest")
    _log.info("started in %s", phases)
    return Built(engine, intake, grammars, load, check, plan, phases)


def _activations(
    args: EngineArgs, networks: Networks, media: MediaReader, bounds: tuple[int, int], *, rehearsed: bool
) -> int:
    """Bytes that a step takes for a while on a GPU; an encoder is done before the decoder begins."""
    model, encoder = networks
    of_model = activation_nbytes(model, *bounds, page_size=PAGE_SIZE, rehearsed=rehearsed)
    if encoder is None:
        return of_model
    of_items = encoding_nbytes(encoder, media.largest(model.config.max_positions))
    return max(of_model, of_items) + args.media_memory


def default_mm_loras(args: EngineArgs, media: MediaReader) -> dict[str, LoRARequest]:
    """By modality; each is served under its modality's name. Raises `ConfigError` for one that the model has not."""
    requests = {}
    for modality, path in (args.default_mm_loras or {}).items():
        if modality not in media.modalities:
            taken = ", ".join(("text", *sorted(media.modalities)))
            raise ConfigError(f"default_mm_loras: the model {args.model!r} takes {taken}, no {modality!r}")
        number = int.from_bytes(sha256(f"default {modality}".encode()).digest()[:7])
        requests[modality] = LoRARequest(modality, number, path)
    return requests


def _meanwhile(networks: Networks, args: EngineArgs) -> list[Future[bool]]:
    """What a GPU's start can do in threads while weights are read: lock memory and, of a decoder of ours, compile.

    Locking holds up whoever uses the GPU, so that it comes first.
    """
    model, encoder = networks
    layout = None
    if args.enable_lora:
        dtype = _lora_dtype(args, model.embed.weight.dtype)
        layout = layout_of(model, dtype, encoder=encoder, only=args.lora_target_modules)
        reserve_soon(layout, _pinned_pages(args, layout))
    return [compile_ahead(model, args, layout)] if isinstance(model, Decoder) and has_kernels() else []


def _lora_dtype(args: EngineArgs, dtype: torch.dtype) -> torch.dtype:
    return dtype if args.lora_dtype == "auto" else DTYPES[args.lora_dtype]


def _pinned_pages(args: EngineArgs, layout: Layout) -> dict[int, int]:
    """Pages (kind -> count) to be locked from the start: as many as host memory will ever hold, and those being read.

    None of routed experts, which are large and which most adapters leave alone.

    Locking holds up whoever uses the GPU, 0.6 ms a MB: 16 streams beside loads of 336 MB waited 281 ms (p99, H100).
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kinds = layout.page_kinds.linears
    page = sum(map(layout.page_nbytes, kinds))
    wish = (args.host_adapters + READERS) * -(-args.max_lora_rank // RANKS_PER_PAGE)
    return dict.fromkeys(kinds, min(wish, memory // _PINNED_SHARE // page)) if kinds else {}


def _stores(model: Model, layout: Layout | None, plan: Plan) -> tuple[AdapterPool | None, KVCache]:
    """Raises `ConfigError` where the plan, or what was asked for by bytes, is more than the memory has."""
    dtype, pages = model.embed.weight.dtype, {"num_pages": plan.num_pages, "page_size": plan.page_size}
    try:
        pool = AdapterPool(layout, plan.adapter_room, plan.device) if layout else None
        return pool, KVCache(model.config, **pages, dtype=dtype, device=plan.device)
    except torch.OutOfMemoryError as error:
        sizes = plan.weights_nbytes, plan.adapter_nbytes, plan.kv_nbytes
        weights, adapters, kv = (f"{size / 2**30:.1f} GiB" for size in sizes)
        raise ConfigError(
            f"the KV cache of {kv} and the adapters' {adapters} do not fit beside {weights} of weights; "
            "lower --kv-cache-memory, --lora-memory, --max-loras or --gpu-memory-utilization"
        ) from error


def _engine(
    args: EngineArgs,
    networks: Networks,
    layout: Layout | None,
    plan: Plan,
    tokenizer: Tokenizer,
    media: MediaReader,
    read_again: Callable[[AdapterVersion], None],
) -> tuple[Engine, ModelRunner]:
    model, encoder = networks
    kinds = layout.page_kinds if layout else PageKinds(0)
    residency: Residency[AdapterWeights] = Residency(kinds, plan.adapter_room, max_host=args.host_adapters)
    pool, cache = _stores(model, layout, plan)
    if pool is not None:
        pool.attach(model, encoder)
    packer = Packer(
        page_size=plan.page_size,
        kinds=kinds,
        residency=residency,
        device=plan.device,
        lora_pages=plan.lora_pages,
        rows=pool.rows if pool else None,
        turns_apart=bool(model.config.rope_sections),
    )
    sampler = Sampler(tokenizer.eos_token_ids)
    encoding = None
    if encoder is not None:
        sizes = {"hidden_size": model.embed.weight.shape[1], "limit": args.media_memory}
        encoding = Encoding(encoder, packer, kinds, device=plan.device, **sizes)
    runner = ModelRunner(
        model,
        cache,
        packer,
        sampler,
        max_num_seqs=plan.max_num_seqs,
        encoding=encoding,
        compiled=args.compile,
    )
    limits = SchedulerLimits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_loras=args.max_loras,
        page_size=plan.page_size,
        prefix_caching=args.enable_prefix_caching,
        chunked_prefill=args.enable_chunked_prefill,
        media_items=4 if plan.device == "cuda" else 1,  # 10 ms each, or hundreds
    )
    scheduler = Scheduler(limits, PagePool(plan.num_pages), residency)
    until = Ends(eos_token_ids=tokenizer.eos_token_ids, max_model_len=plan.max_model_len)
    one = -(-args.max_lora_rank // RANKS_PER_PAGE)
    engine = Engine(
        scheduler,
        runner,
        residency,
        pool,
        ends=until,
        seed=args.seed,
        masks=Masks(Together()),
        room_of_one=one,
        read_again=read_again,
    )
    return engine, runner
