"""A model ready to run, from its folder."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig

from aiolora.config import EngineArgs
from aiolora.errors import ConfigError, ModelError
from aiolora.models.decoder import Decoder
from aiolora.models.encoder import Encoder
from aiolora.models.families import decoder_config
from aiolora.models.multimodal import MULTIMODAL, current_name
from aiolora.models.weights import load_weights, random_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Networks(NamedTuple):
    """What a model consists of."""

    decoder: Decoder
    encoder: Encoder | None  # of images or recordings; None: it takes text only


def load_decoder(args: EngineArgs, folder: Path, *, device: str) -> Decoder:
    """`load_networks` of a model that takes text only, or the decoder of another."""
    return load_networks(args, folder, device=device).decoder


def load_networks(args: EngineArgs, folder: Path, *, device: str) -> Networks:
    """Build the networks that the config of `folder` describes and fill their weights.

    Raises `UnsupportedModelError`, `WeightsError`, or `ConfigError` for a context longer than the model's.
    """
    hf = _read_config(folder)
    context = hf.get_text_config().max_position_embeddings
    if args.max_model_len is not None and args.max_model_len > context:
        raise ConfigError(f"max_model_len={args.max_model_len} is over the model's context of {context} tokens")
    config = decoder_config(hf, max_positions=args.max_model_len)
    dtype = _dtype(args.dtype, hf.dtype or hf.get_text_config().dtype, device)
    with torch.no_grad():
        model = Decoder(config, dtype=dtype, device=device)
        dummy = args.load_format == "dummy"
        encoder = Encoder(hf, dtype=dtype, device=device, filled=dummy) if hf.model_type in MULTIMODAL else None
        if dummy:
            random_weights(model, args.seed)
        elif encoder is None:
            load_weights(model, folder)
        else:
            load_weights(model, folder, more=encoder.checkpoint(), current_name=current_name)
    return Networks(model.eval(), encoder)


def outline(folder: Path) -> Networks:
    """The networks that the config of `folder` describes, without weights, in the dtype they are stored in.

    Raises `ModelError` or `UnsupportedModelError`.
    """
    hf = _read_config(folder)
    dtype = hf.dtype or hf.get_text_config().dtype or torch.float32
    decoder = Decoder(decoder_config(hf, max_positions=None), dtype=dtype, device="meta")
    return Networks(decoder, Encoder(hf, dtype=dtype, device="meta") if hf.model_type in MULTIMODAL else None)


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # what transformers raises of JSON
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
