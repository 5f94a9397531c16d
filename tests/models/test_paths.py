"""Which way a config is served, decided without weights, and why."""

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from aiolora.errors import ModelError, ModelNotFoundError
from aiolora.models.loading import look_up
from aiolora.models.paths import context_of, way_of
from tests.borrowed import ONE_BY_ONE, REFUSED, SERVED, SIZES, write_config


def config(kind: str, **changes: Any) -> Any:
    return CONFIG_MAPPING[kind](**(SIZES | changes))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "qwen3"])
def test_a_family_is_our_decoders_and_needs_no_reason(kind: str) -> None:
    way = way_of(config(kind))
    assert (way.model_type, way.impl, way.reasons) == (kind, "aiolora", ())


@pytest.mark.parametrize("name", SERVED)
def test_what_transformers_computes_is_found_without_weights(name: str) -> None:
    kind, changes = SERVED[name]
    assert way_of(config(kind, **changes), "transformers").impl == "transformers"


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_what_is_slower_than_it_could_be_says_so(name: str) -> None:
    kind, changes = ONE_BY_ONE[name]
    way = way_of(config(kind, **changes))
    assert way.impl == "transformers"
    assert way.reasons[-1].startswith("one sequence of a step after the other: ")


def test_queries_scaled_by_their_place_in_a_step_are_refused_where_that_shows() -> None:
    assert way_of(config("llama4_text", max_position_embeddings=8192)).impl == "transformers"
    way = way_of(config("llama4_text", max_position_embeddings=8193))
    assert way.impl is None
    assert "floor_scale=8192" in way.reasons[-1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_serves_says_why_of_each_way(name: str) -> None:
    kind, changes, reason = REFUSED[name]
    way = way_of(config(kind, **changes))
    assert way.impl is None
    assert len(way.reasons) == 2
    assert way.reasons[0].startswith("our decoder has the families")
    assert way.reasons[1].startswith("transformers' code with our attention: ")
    assert reason in way.reasons[1]
    assert str(way.refusal).startswith(f"model_type {kind!r} is not served: our decoder")


def test_a_family_with_a_part_that_our_decoder_lacks_is_transformers() -> None:
    way = way_of(config("llama", hidden_act="gelu"))
    assert way.impl == "transformers"
    (reason,) = way.reasons
    assert reason.startswith("our decoder: hidden_act 'gelu' is not served; served are: silu, ")


def test_a_wish_is_kept_or_refused() -> None:
    assert way_of(config("llama"), "transformers").impl == "transformers"
    refused = way_of(config("gpt2"), "aiolora")
    assert refused.impl is None
    assert "model_impl='aiolora' allows no other" in str(refused.refusal)


def test_a_model_is_looked_up_by_its_folder_and_its_config_alone(tmp_path: Path) -> None:
    way = look_up(str(write_config(tmp_path / "gpt2", *SERVED["gpt2"])))
    assert (way.model_type, way.impl) == ("gpt2", "transformers")
    assert look_up(str(write_config(tmp_path / "llama", "llama", {}))).impl == "aiolora"
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        look_up(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        look_up(str(tmp_path))


def test_several_modalities_and_quantised_weights_are_refused_by_name() -> None:
    assert "several modalities" in way_of(CONFIG_MAPPING["gemma3"]()).reasons[-1]
    quantised = config("gpt2", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "its weights are quantised (gptq)" in way_of(quantised).reasons[-1]


def test_the_context_ends_where_a_long_neighbour_would_turn_everybody() -> None:
    assert context_of(config("gpt2")) == 256
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    long = longrope | {"original_max_position_embeddings": 64, "factor": 4.0}
    assert context_of(config("llama", rope_parameters=long)) == 64
    of_layers = {"full_attention": long, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert context_of(type("Hf", (), {"rope_parameters": of_layers, "max_position_embeddings": 256})) == 64
    assert context_of(type("Hf", (), {})) is None
