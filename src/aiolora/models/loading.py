"""A model ready to run, from its folder."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig

from aiolora.config import EngineArgs
from aiolora.errors import ConfigError, ModelError, UnsupportedModelError
from aiolora.models.decoder import Decoder
from aiolora.models.encoder import Encoder
from aiolora.models.families import decoder_config
from aiolora.models.llama_config import LlamaConfig
from aiolora.models.model import Model
from aiolora.models.multimodal import MULTIMODAL
from aiolora.models.paths import Way, context_of, way_of
from aiolora.models.weights import load_weights, locate, random_weights
from aiolora.types import Report, unreported

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Networks(NamedTuple):
    """What a model consists of."""

    decoder: Model
    encoder: Encoder | None = None  # of images or recordings; None: it takes text only

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes for network in self if network is not None for weight in network.parameters())


def load_decoder(args: EngineArgs, folder: Path, *, device: str) -> Model:
    """`load_networks` of a model that takes text only, or the decoder of another."""
    return load_networks(args, folder, read_config(folder), device=device).decoder


def load_networks(
    args: EngineArgs,
    folder: Path,
    hf: PreTrainedConfig,
    *,
    device: str,
    report: Report = unreported,
    outlined: Callable[[Networks], None] = lambda networks: None,
) -> Networks:
    """Build the networks that `hf`, the config of `folder`, describes and fill their weights.

    `outlined` gets them, those of ours before their weights are read, which takes the longest.
    Raises `UnsupportedModelError`, `WeightsError`, or `ConfigError` for a context longer than the model's.
    """
    way, text = way_of(hf, args.model_impl), hf.get_text_config()
    if way.impl is None:
        raise way.refusal
    longest = text.max_position_embeddings if way.impl == "aiolora" else context_of(hf)
    if longest is not None and args.max_model_len is not None and args.max_model_len > longest:
        raise ConfigError(f"max_model_len={args.max_model_len} is over the model's context of {longest} tokens")
    dtype = _dtype(args.dtype, hf.dtype or text.dtype, device)
    if way.impl == "transformers":
        networks = Networks(_load_fallback(args, folder, hf, way, dtype, device))
        outlined(networks)
        return networks
    config = decoder_config(hf, max_positions=args.max_model_len)
    if args.compile and config.moe is not None:
        raise ConfigError(f"compile=True, but model_type {hf.model_type!r} has experts, which are run as they are")
    with torch.no_grad():
        model = Decoder(config, dtype=dtype, device=device)
        dummy = args.load_format == "dummy"
        encoder = Encoder(hf, dtype=dtype, device=device, filled=dummy) if hf.model_type in MULTIMODAL else None
        outlined(Networks(model, encoder))
        if dummy:
            random_weights(model, args.seed)
        elif encoder is None:
            load_weights(model, folder, report=report)
        else:
            load_weights(model, folder, more=encoder.checkpoint(), report=report)
    return Networks(model.eval(), encoder)


def _load_fallback(
    args: EngineArgs, folder: Path, hf: PreTrainedConfig, way: Way, dtype: torch.dtype, device: str
) -> Model:
    from aiolora.models.building import load_fallback  # transformers' models: 4 s to import

    max_positions = args.max_model_len or context_of(hf)
    if max_positions is None:
        raise ConfigError("the model's config does not say how long its context is; give max_model_len")
    if args.compile:
        raise ConfigError(
            f"compile=True, but model_type {hf.model_type!r} runs transformers' code, which is run as it is"
        )
    seed = args.seed if args.load_format == "dummy" else None
    started_s = time.monotonic()
    try:
        model = load_fallback(folder, hf, dtype=dtype, device=device, max_positions=max_positions, seed=seed)
    except UnsupportedModelError as error:
        raise replace(way, impl=None, reasons=(*way.reasons, str(error))).refusal from error
    seconds, why = time.monotonic() - started_s, "; ".join(way.reasons)
    _log.info("%s runs transformers' code, up to %d tokens, in %.1f s: %s", hf.model_type, max_positions, seconds, why)
    return model


def look_up(model: str, wished: Literal["auto", "aiolora", "transformers"] = "auto") -> Way:
    """How `model` (a folder, a name, a repository) would be served, and why; of it the config alone is fetched.

    Blocks. Raises `ModelNotFoundError`, or `ModelError` for a config that cannot be read.
    """
    return way_of(read_config(locate(model, only=("*.json",))), wished)


def outline(folder: Path) -> Networks:
    """The networks that the config of `folder` describes, without weights, in the dtype they are stored in.

    Raises `ModelError` or `UnsupportedModelError`.
    """
    hf = read_config(folder)
    way = way_of(hf)
    if way.impl is None:
        raise way.refusal
    dtype = hf.dtype or hf.get_text_config().dtype or torch.float32
    if way.impl == "aiolora":
        decoder = Decoder(decoder_config(hf, max_positions=None), dtype=dtype, device="meta")
        return Networks(decoder, Encoder(hf, dtype=dtype, device="meta") if hf.model_type in MULTIMODAL else None)
    from aiolora.models import building

    try:
        return Networks(building.outlined(hf, dtype=dtype))
    except NotImplementedError as error:
        raise UnsupportedModelError(f"model_type {hf.model_type!r} cannot be judged without its weights") from error


def read_config(folder: Path) -> PreTrainedConfig:
    """What transformers makes of config.json in `folder`. Raises `ModelError`."""
    try:
        said, _ = PreTrainedConfig.get_config_dict(folder)
        kind = LlamaConfig if said.get("model_type") == LlamaConfig.model_type else AutoConfig
        config: PreTrainedConfig = kind.from_pretrained(folder)
    except Exception as error:  # of a file that anybody may have written
        raise ModelError(f"{folder}/config.json cannot be read: {error}") from error
    return config


def _dtype(said: str, stored: torch.dtype | None, device: str) -> torch.dtype:
    if said != "auto":
        return DTYPES[said]
    if device == "cpu":
        # bfloat16 halves the bytes of a step, but without AVX512-BF16 its products are slower than float32's
        has_bf16 = stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
