"""Schemas at random: every answer parses and validates at temperature 1. `benchmarks.schemas` has 1,000 of them."""

import json
from pathlib import Path

import pytest

from aiolora import LLM, LoRARequest
from benchmarks.random_schemas import draw, read_schemas, write_schemas
from benchmarks.schemas import answers, counts, resume
from tests.tiny import make_adapter, make_model


@pytest.mark.parametrize("overlaps", [False, True])
def test_every_answer_at_temperature_1_parses_and_validates(tmp_path: Path, overlaps: bool) -> None:
    model = make_model(tmp_path / "bytes", vocab_size=320, tie_word_embeddings=True, max_position_embeddings=4096)
    llm = LLM(str(model), dtype="float32", enable_lora=True, max_num_seqs=16)
    llm.engine._built.engine._runner.overlaps = overlaps
    lora = LoRARequest("a", 1, str(make_adapter(model, tmp_path / "a", seed=1)))
    # a model of random weights would hardly end a text or a number: it is made to like what ends them
    ends = dict.fromkeys(llm.engine._built.intake.tokenizer.encode('"}],05', special=False), 4.0)
    schemas = dict(enumerate(draw(40, seed=int(overlaps))))
    told = {
        answer.number: answer for answer in answers(llm, schemas, rows=16, lora=lora, max_tokens=1000, logit_bias=ends)
    }
    assert told.keys() == schemas.keys()
    assert counts(told) == "40 valid, 0 cut, 0 wrong, 0 refused", [a for a in told.values() if a.verdict != "valid"]


def test_the_same_seed_draws_the_same_schemas_and_another_one_others() -> None:
    assert draw(20, seed=1) == draw(20, seed=1) != draw(20, seed=2)


def test_schemas_that_are_written_are_read_again_as_they_were(tmp_path: Path) -> None:
    schemas = draw(30)
    write_schemas(schemas, tmp_path / "schemas.jsonl")
    assert read_schemas(tmp_path / "schemas.jsonl") == schemas


def test_a_run_that_was_stopped_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "new" / "schemas.csv"
    assert resume(file, "# of 3") == {}
    whole = file.read_text() + '0,valid,2,,"{}","""a, b\\n"""\n2,refused,0,no such key,{},\n'
    file.write_text(whole + "1,cut,9,Untermin")
    told = resume(file, "# of 3")
    assert [(number, answer.verdict, answer.tokens) for number, answer in told.items()] == [
        (0, "valid", 2),
        (2, "refused", 0),
    ]
    assert json.loads(told[0].text) == "a, b\n"
    assert file.read_text() == whole
    with pytest.raises(SystemExit, match="of another run"):
        resume(file, "# of 4")
