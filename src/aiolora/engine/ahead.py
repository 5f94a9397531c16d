"""Kernels compiled ahead: while weights are read, an outline of the model takes the steps that serving will take."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from aiolora.config import EngineArgs
from aiolora.engine.batch import Packer
from aiolora.engine.kv_cache import KVCache
from aiolora.engine.plan import PAGE_SIZE, make_plan
from aiolora.engine.runner import ModelRunner
from aiolora.engine.sampler import Sampler
from aiolora.errors import ConfigError
from aiolora.lora.kinds import PageKinds, Room
from aiolora.lora.layout import Layout, layout_of
from aiolora.lora.pool import AdapterPool
from aiolora.lora.residency import Residency
from aiolora.models.decoder import Decoder, DecoderConfig
from aiolora.models.loading import DTYPES

_log = logging.getLogger(__name__)
_ROOM = Room(2, 1, 2, 1, 2)  # a little of everything: kernels do not know how many pages there are


def compile_ahead(model: Decoder, args: EngineArgs, layout: Layout | None) -> Future[bool]:
    """Begin to compile what the steps of `model` launch on the current GPU; it may still be without weights.

    `layout`: of its adapters' pages. The result says whether all was compiled: it is not where `--lora-target-modules`
    names layers that an outline has not. Then time alone is lost: kernels are compiled when they are launched.
    """
    kinds = _kinds(layout)
    device, config, dtype = torch.cuda.current_device(), model.config, model.embed.weight.dtype

    def compiled() -> bool:
        torch.cuda.set_device(device)
        try:
            outlined = rehearse_outline(config, dtype, args)
        except ConfigError:  # of the outline alone, or to be raised again where somebody hears it
            return False
        except Exception:
            _log.warning("kernels were not compiled ahead", exc_info=True)
            return False
        return outlined == kinds

    pool = ThreadPoolExecutor(1, thread_name_prefix="aiolora-ahead")
    future = pool.submit(compiled)
    pool.shutdown(wait=False)
    return future


def rehearse_outline(config: DecoderConfig, dtype: torch.dtype, args: EngineArgs) -> list[str]:
    """Rehearse a few layers on "meta"; which kinds of site they had for adapters.

    Raises what `layout_of`, `make_plan` and compilers raise.
    """
    with torch.inference_mode():
        model = Decoder(few_layers(config), dtype=dtype, device="meta").eval()
        layout = None
        if args.enable_lora:
            lora_dtype = dtype if args.lora_dtype == "auto" else DTYPES[args.lora_dtype]
            layout = layout_of(model, lora_dtype, only=args.lora_target_modules)
        plan = make_plan(args, config, layout, dtype, "cuda")
        kinds, pool = PageKinds(0), None
        if layout is not None:
            kinds, pool = layout.page_kinds, AdapterPool(layout, _ROOM, "meta")
            pool.attach(model)
        packer = Packer(
            page_size=PAGE_SIZE,
            kinds=kinds,
            residency=Residency(kinds, _ROOM, max_host=1),
            device="meta",
            lora_pages=plan.lora_pages,
            rows=pool.rows if pool else None,
        )
        cache = KVCache(model.config, num_pages=1, page_size=PAGE_SIZE, dtype=dtype, device="meta")
        runner = ModelRunner(model, cache, packer, Sampler(frozenset()), max_num_seqs=plan.max_num_seqs)
    runner.rehearse(plan, kinds=kinds.sites)
    return _kinds(layout)


def _kinds(layout: Layout | None) -> list[str]:
    """Names of its kinds of site but an encoder's, which an outline has not."""
    towers = layout.page_kinds.of_towers if layout else ()
    return [kind.name for number, kind in enumerate(layout.kinds) if number not in towers] if layout else []


def few_layers(config: DecoderConfig) -> DecoderConfig:
    """The same with at most two layers of each sort: the others launch what those do."""
    moe = config.moe
    sorts = [
        (rope, window, moe is not None and index in moe.layers)
        for index, (rope, window) in enumerate(zip(config.ropes, config.windows, strict=True))
    ]
    kept = [index for index, sort in enumerate(sorts) if sorts[:index].count(sort) < 2]
    if moe is not None:
        moe = replace(moe, layers=frozenset(place for place, index in enumerate(kept) if index in moe.layers))
    return replace(
        config,
        num_layers=len(kept),
        ropes=tuple(config.ropes[index] for index in kept),
        windows=tuple(config.windows[index] for index in kept),
        moe=moe,
    )
