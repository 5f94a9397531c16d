"""Which way a model is served, and why: by our decoder, by transformers' code with our parts in it, or not at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from aiolora.errors import ModelError, UnsupportedModelError
from aiolora.models.families import FAMILIES, decoder_config
from aiolora.models.multimodal import MULTIMODAL

Impl: TypeAlias = Literal["aiolora", "transformers"]
_SEEN = ("full_attention", "sliding_attention", "chunked_attention")  # layers that keep keys and values alone


@dataclass(frozen=True)
class Way:
    """What was decided of a config."""

    model_type: str
    impl: Impl | None  # None: not served
    reasons: tuple[str, ...] = ()  # why not a better one
    modalities: tuple[str, ...] = ()  # what it takes besides text

    @property
    def refusal(self) -> UnsupportedModelError:
        return UnsupportedModelError(f"model_type {self.model_type!r} is not served: {'; '.join(self.reasons)}")


def way_of(hf: Any, wished: Literal["auto", "aiolora", "transformers"] = "auto") -> Way:
    """How the model of a transformers config is served; the config alone is read.

    "transformers" may still turn out not to be served once there are weights: `load_decoder` then says so.
    """
    reasons: list[str] = []
    if wished == "transformers":
        reasons.append("model_impl='transformers'")
    elif hf.model_type not in FAMILIES and hf.model_type not in MULTIMODAL:
        reasons.append(f"our decoder has the families {', '.join(sorted(FAMILIES.keys() | MULTIMODAL.keys()))}")
    else:
        try:
            decoder_config(hf)
        except UnsupportedModelError as error:
            reasons.append(f"our decoder: {error}")
        else:
            kind = MULTIMODAL.get(hf.model_type)
            return Way(hf.model_type, "aiolora", modalities=() if kind is None else tuple(sorted(kind.ways)))
    if wished == "aiolora":
        return Way(hf.model_type, None, (*reasons, "model_impl='aiolora' allows no other"))
    try:
        _check(hf)
        slower = _slower(hf)
    except ModelError as error:
        return Way(hf.model_type, None, (*reasons, f"transformers' code with our attention: {error}"))
    return Way(hf.model_type, "transformers", (*reasons, *slower))


def context_of(hf: Any) -> int | None:
    """Positions that the model of a config can have, whoever else is in the step; None: the config does not say.

    With "longrope" a whole step is rotated otherwise as soon as one token is beyond the original context.
    """
    try:
        longest: int | None = getattr(hf, "max_position_embeddings", None)
    except NotImplementedError:  # of a config that knows of no end
        longest = None
    original = [
        values["original_max_position_embeddings"]
        for values in _ropes(getattr(hf, "rope_parameters", None) or {})
        if values.get("rope_type") == "longrope" and values.get("original_max_position_embeddings")
    ]
    return min([*original, *([longest] if longest else [])], default=None)


def _ropes(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameters themselves, or those of each type of layer."""
    yield from (parameters,) if "rope_type" in parameters else filter(_is_dict, parameters.values())


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _check(hf: Any) -> None:
    """Raises `UnsupportedModelError` for what a config says that transformers' code cannot be served for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL  # 4 s to import

    if hf.is_encoder_decoder:
        raise UnsupportedModelError("an encoder-decoder attends to another sequence than its own")
    if hf.model_type not in CAUSAL:
        raise UnsupportedModelError("transformers has no causal language model of this type")
    if hf.get_text_config() is not hf:
        raise UnsupportedModelError("it is of several modalities, and only text models are served so")
    floor = getattr(hf, "floor_scale", None)
    if floor is not None and getattr(hf, "attn_temperature_tuning", False) and hf.max_position_embeddings > floor:
        raise UnsupportedModelError(
            f"from position floor_scale={floor} on its queries are scaled by their place in a step, not in the text; a "
            "config with attn_temperature_tuning=false or a max_position_embeddings up to that is served"
        )
    kinds = dict.fromkeys(getattr(hf, "layer_types", None) or ())
    if other := [kind for kind in kinds if kind not in _SEEN]:
        raise UnsupportedModelError(f"layers of {', '.join(other)} keep a state beside keys and values")
    if quantized := getattr(hf, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedModelError(f"its weights are quantised ({method})")


def _slower(hf: Any) -> tuple[str, ...]:
    """Why its sequences run one after the other, if they do; what shows in values only is not found without weights.

    Raises what taking it apart raises.
    """
    from aiolora.models.building import outlined
    from aiolora.models.one_by_one import OneByOne

    try:
        manner = outlined(hf, dtype=torch.float32).manner
    except NotImplementedError:
        return ()
    return (f"one sequence of a step after the other: {manner.reason}",) if isinstance(manner, OneByOne) else ()
