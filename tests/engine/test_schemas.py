"""Schemas at random: every answer parses and validates at temperature 1. `benchmarks.schemas` has 1,000 of them."""

from pathlib import Path

import pytest

from aiolora import LLM, LoRARequest
from benchmarks.schemas import draw, faults
from tests.tiny import make_adapter, make_model


@pytest.mark.parametrize("overlaps", [False, True])
def test_every_answer_at_temperature_1_parses_and_validates(tmp_path: Path, overlaps: bool) -> None:
    model = make_model(tmp_path / "bytes", vocab_size=320, tie_word_embeddings=True, max_position_embeddings=4096)
    llm = LLM(str(model), dtype="float32", enable_lora=True, max_num_seqs=16)
    llm.engine._built.engine._runner.overlaps = overlaps
    lora = LoRARequest("a", 1, str(make_adapter(model, tmp_path / "a", seed=1)))
    # a model of random weights would hardly end a text or a number: it is made to like what ends them
    ends = dict.fromkeys(llm.engine._built.intake.tokenizer.encode('"}],05', special=False), 4.0)
    schemas = draw(40, seed=int(overlaps))
    assert faults(llm, schemas, lora=lora, max_tokens=1000, logit_bias=ends) == []


def test_the_same_seed_draws_the_same_schemas_and_another_one_others() -> None:
    assert draw(20, seed=1) == draw(20, seed=1) != draw(20, seed=2)
