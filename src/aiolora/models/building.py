"""Models that transformers builds and loads, made into a `Fallback`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from aiolora.errors import UnsupportedModelError, WeightsError
from aiolora.models.fallback import MASKED, Fallback
from aiolora.models.proof import Expected, prove
from aiolora.models.weights import listed, shards

# masks and frequencies that were once saved, and are computed now
_BUFFER = re.compile(r"\.(self_)?(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


def load_fallback(
    folder: Path, hf: PreTrainedConfig, *, dtype: torch.dtype, device: str, max_positions: int, seed: int | None
) -> Fallback:
    """The model in `folder`, ready and proven; with a `seed` random weights in the place of its own.

    Raises `UnsupportedModelError`, or `WeightsError` naming tensors that do not fit.
    """
    with _quiet():
        causal = _loaded(folder, hf, dtype) if seed is None else _drawn(hf, dtype, seed)
    causal = causal.to(device).eval()
    expected = Expected.of(causal)
    model = Fallback(causal, max_positions=max_positions, device=device)
    prove(model, expected)
    return model


def outlined(hf: PreTrainedConfig, *, dtype: torch.dtype) -> Fallback:
    """The model of a config without weights. Raises as `Fallback` and `rehearse` do."""
    with torch.device("meta"), _quiet():
        causal = _of_config(hf, dtype)
    if causal._can_set_experts_implementation():
        causal.set_experts_implementation("batched_mm")  # the one whose shapes do not depend on values
    return Fallback(causal, max_positions=MASKED, device="meta")


def _of_config(hf: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            deepcopy(hf), dtype=dtype, attn_implementation="eager", trust_remote_code=False
        )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise UnsupportedModelError(f"transformers cannot build it: {error}") from error
    return model


def _drawn(hf: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _of_config(hf, dtype)


def _loaded(folder: Path, hf: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    shards(folder)  # says better what is missing
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=deepcopy(hf),
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise WeightsError(f"{folder}: not whole safetensors files: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise WeightsError(f"{folder}: transformers cannot load it: {error}") from error
    for what, key in (
        ("tensors of another shape", "mismatched_keys"),
        ("tensors missing", "missing_keys"),
        ("tensors unknown to this architecture", "unexpected_keys"),
    ):
        if names := sorted(name for name in map(str, loading[key]) if not _BUFFER.search(name)):
            raise WeightsError(f"{folder}: {listed(what, names)}")
    checked: PreTrainedModel = model
    return checked


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what is wrong is raised."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
