"""A model ready to run, from its folder."""

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from aiolora.config import EngineArgs
from aiolora.errors import ConfigError, ModelError
from aiolora.models.decoder import Decoder
from aiolora.models.families import decoder_config
from aiolora.models.weights import load_weights, random_weights
from aiolora.types import Report, unreported

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_decoder(args: EngineArgs, folder: Path, *, device: str, report: Report = unreported) -> Decoder:
    """Build the decoder that the config of `folder` describes and fill its weights.

    Raises `UnsupportedModelError`, `WeightsError`, or `ConfigError` for a context longer than the model's.
    """
    hf = _read_config(folder)
    if args.max_model_len is not None and args.max_model_len > hf.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={args.max_model_len} is over the model's context of {hf.max_position_embeddings} tokens"
        )
    config = decoder_config(hf, max_positions=args.max_model_len)
    with torch.no_grad():
        model = Decoder(config, dtype=_dtype(args.dtype, hf.dtype, device), device=device)
        if args.load_format == "dummy":
            random_weights(model, args.seed)
        else:
            load_weights(model, folder, report)
    return model.eval()


def outline(folder: Path) -> Decoder:
    """The decoder that the config of `folder` describes, without weights, in the dtype they are stored in.

    Raises `ModelError` or `UnsupportedModelError`.
    """
    hf = _read_config(folder)
    return Decoder(decoder_config(hf, max_positions=None), dtype=hf.dtype or torch.float32, device="meta")


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
