"""What answers must match: regular expressions, JSON schemas, choices and grammars, on every face of the engine."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiolora import LLM, AsyncLLMEngine, EngineArgs, LoRARequest, SamplingParams, StructuredOutputsParams
from aiolora.engine import grammar
from aiolora.engine.grammar import CompiledGrammar, Grammars, Together
from aiolora.errors import GrammarBusyError, GrammarError, RequestError, UnknownModelError
from aiolora.tokenizer import Tokenizer
from aiolora.types import RequestOutput
from tests.tiny import EOS, make_adapter

VOCAB = 320
ARGS: dict[str, Any] = {"dtype": "float32", "enable_lora": True, "max_model_len": 192, "max_num_seqs": 8}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["on", "n"],
    "additionalProperties": False,
}
OBJECT = r'\{\s*"on"\s*:\s*(true|false)\s*,\s*"n"\s*:\s*\d\d?\s*\}'
SHAPES: dict[str, tuple[dict[str, Any], str]] = {  # and what the whole answer matches
    "regex": ({"regex": r"[a-c]{3}-\d{2}"}, r"[a-c]{3}-\d{2}"),
    "choice": ({"choice": ["yes", "no", 'per"haps\n']}, 'yes|no|per"haps\n'),
    "lark": ({"grammar": 'start: "a" | "b" start'}, "b*a"),
    "gbnf": ({"grammar": 'root ::= "x" ("y" | "z")'}, "x[yz]"),
    "json": ({"json": SCHEMA}, OBJECT),
    "json as text": ({"json": json.dumps(SCHEMA)}, OBJECT),
}


@pytest.fixture(scope="module")
def llm(byte_model: Path) -> LLM:
    return LLM(str(byte_model), **ARGS)


@pytest.fixture
def overlapping(llm: LLM) -> Iterator[LLM]:
    """The same engine one step ahead, as on a GPU."""
    runner = llm.engine._built.engine._runner
    runner.overlaps = True
    yield llm
    runner.overlaps = False


@pytest.fixture(scope="module")
def adapter(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    folder = make_adapter(byte_model, tmp_path_factory.mktemp("adapters") / "a", seed=1, strength=2.0)
    return LoRARequest("a", 1, str(folder))


def wish(shape: dict[str, Any], **params: Any) -> SamplingParams:
    given: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 150} | params
    return SamplingParams(structured_outputs=StructuredOutputsParams(**shape), **given)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [answer.text for output in outputs for answer in output.outputs]


@pytest.mark.parametrize("name", SHAPES)
def test_every_answer_matches_whatever_the_adapter_and_ends_by_itself(
    name: str, llm: LLM, adapter: LoRARequest
) -> None:
    shape, pattern = SHAPES[name]
    outputs = llm.generate(
        ["a", "b"] * 2, wish(shape, n=3), lora_request=[None, None, adapter, adapter], use_tqdm=False
    )
    for output in outputs:
        for answer in output.outputs:
            assert re.fullmatch(pattern, answer.text), answer.text
            assert answer.finish_reason == "stop"
            assert answer.token_ids[-1] == EOS
    assert len(set(texts(outputs))) > 1, "an answer is still sampled"


def test_rows_without_a_grammar_answer_as_without_such_neighbours(llm: LLM) -> None:
    free = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    alone = texts(llm.generate(["a", "b"], free, use_tqdm=False))
    params = [free, wish(SHAPES["json"][0]), free, wish(SHAPES["regex"][0])]
    beside = texts(llm.generate(["a", "x", "b", "y"], params, use_tqdm=False))
    assert beside[::2] == alone


def test_one_step_ahead_the_answers_are_the_same(llm: LLM, adapter: LoRARequest) -> None:
    free = SamplingParams(temperature=1.0, seed=5, max_tokens=20)
    params = [wish(shape, n=2, logprobs=2, presence_penalty=0.5) for shape, _ in SHAPES.values()] + [free]
    prompts = [f"prompt {number}" for number in range(len(params))]
    loras = [None, adapter] * len(params)
    runs = []
    for overlaps in (False, True):
        llm.engine._built.engine._runner.overlaps = overlaps
        runs.append(llm.generate(prompts, params, lora_request=loras[: len(params)], use_tqdm=False))
    llm.engine._built.engine._runner.overlaps = False
    assert texts(runs[0]) == texts(runs[1])


def test_neighbours_go_on_while_a_row_waits_for_its_token_to_land(overlapping: LLM) -> None:
    engine = overlapping.engine
    before = engine.snapshot().steps
    engine.add_request("free", "a", SamplingParams(max_tokens=30, ignore_eos=True, temperature=0))
    engine.add_request("grammar", "a", wish({"regex": "x{40}"}, max_tokens=40))
    tokens = {"free": 0, "grammar": 0}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = len(output.outputs[0].token_ids)
        if tokens["free"] < 30:
            assert tokens["grammar"] <= tokens["free"] / 2 + 2, "a row with a grammar runs every other step"
            assert tokens["free"] >= engine.snapshot().steps - before - 1, "and the other one every step"
    assert tokens == {"free": 30, "grammar": 40}


def test_an_answer_goes_on_after_preemption_where_it_was(byte_model: Path) -> None:
    tight = LLM(str(byte_model), **ARGS, kv_cache_memory=14 * 2 * 2 * 16 * 64 // 2 * 4)
    shape = {"regex": "(ab|cd){40}"}
    for overlaps in (False, True):
        tight.engine._built.engine._runner.overlaps = overlaps
        before = tight.engine.snapshot().preemptions
        outputs = tight.generate(["a", "b", "c"], wish(shape, n=2), use_tqdm=False)
        assert tight.engine.snapshot().preemptions > before
        assert all(re.fullmatch("(ab|cd){40}", text) for text in texts(outputs))


def test_stop_strings_ids_and_lengths_end_an_answer_before_its_grammar_does(llm: LLM) -> None:
    shape = {"regex": "abc{1,50}d"}
    [b] = llm.engine._built.intake.tokenizer.encode("b", special=False)
    params = [wish(shape, stop="bc"), wish(shape, stop_token_ids=[b]), wish(shape, max_tokens=2)]
    outputs = llm.generate(["a"] * 3, params, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop", "stop", "length"]
    assert [output.outputs[0].stop_reason for output in outputs] == ["bc", b, None]
    assert texts(outputs) == ["a", "a", "ab"]


def test_log_probabilities_are_those_of_the_raw_logits(llm: LLM) -> None:
    [output] = llm.generate("a", wish({"choice": ["q"]}, logprobs=0), use_tqdm=False)
    [free] = llm.generate("aq", SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    [token, end] = output.outputs[0].token_ids
    assert end == EOS
    chosen, raw = output.outputs[0].logprobs, free.prompt_logprobs
    assert chosen is not None
    assert raw is not None
    assert raw[-1] is not None
    assert chosen[0][token].logprob == pytest.approx(raw[-1][token].logprob, abs=1e-4)
    assert chosen[0][token].logprob < -0.1, "it was the only one allowed, and not the likeliest"


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"json": {"type": "obj"}}, "obj"),
        ({"json": "{"}, "EOF"),
        ({"json": {"$ref": "https://example.com/x.json"}}, "not present"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": False}, "schema"),
        ({"grammar": "start: x"}, "unknown name"),
        ({"regex": "a" * grammar.MAX_SOURCE + "a"}, str(grammar.MAX_SOURCE)),
        ({"json": {"enum": ["a" * grammar.MAX_SOURCE]}}, str(grammar.MAX_SOURCE)),
        ({"grammar": "root ::= " + "\n " * grammar.MAX_GBNF}, str(grammar.MAX_GBNF)),
        ({"grammar": "root ::= " + "(" * 9000}, "recursion"),
        ({"json": {"a": {1}}}, "set"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_says_why(shape: dict[str, Any], says: str, llm: LLM) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match=says) as refused:
            llm.generate("a", wish(shape), use_tqdm=False)
        assert refused.value.param == "structured_outputs"
        refused.value.param = "response_format"  # as a route may word it, for this caller alone
    assert not llm.engine.has_unfinished_requests()


@pytest.mark.parametrize(
    "shape", [{}, {"json_object": False}, {"choice": []}, {"regex": "a", "json": {}}, {"json_object": True, "json": {}}]
)
def test_exactly_one_kind_is_asked_for(shape: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="give one of"):
        StructuredOutputsParams(**shape)


@pytest.mark.parametrize("params", [{"min_tokens": 2}, {"ignore_eos": True}])
def test_a_grammar_alone_says_where_the_answer_ends(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        wish({"regex": "a"}, **params)
    assert refused.value.param == next(iter(params))


@pytest.fixture
def grammars(byte_model: Path) -> Grammars:
    return Grammars(Tokenizer(byte_model).json, vocab_size=VOCAB, eos_token_ids={EOS})


def test_equal_wishes_are_compiled_once_and_those_used_last_are_kept(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_CACHE_NBYTES", 3 * grammar._nbytes(("regex", "x" * 60)))
    first = grammars.wait(wish({"regex": "a"}))
    assert grammars.wait(wish({"regex": "a"})) is first
    for number in range(8):
        grammars.wait(wish({"regex": f"b{{{number}}}"}))
        assert grammars.wait(wish({"regex": "a"})) is first, "it was used just now"
        assert grammars._nbytes <= grammar._CACHE_NBYTES
        assert grammars._nbytes == sum(map(grammar._nbytes, grammars._cache))
    assert len(grammars._cache) < 5


def test_advanced_together_matchers_are_where_each_would_be_alone_and_one_that_fails_fails_alone(
    grammars: Grammars, byte_model: Path
) -> None:
    shapes: list[dict[str, Any]] = [{"regex": "[a-c]{3}x"}, {"regex": "abz?"}, {"choice": ["abc", "abd"]}]
    compiled = [one for one in (grammars.wait(wish(shape)) for shape in shapes) if one is not None]
    together, alone = ([one.begin({EOS, VOCAB + 40}) for one in compiled] for _ in range(2))
    advance = Together()
    encode = Tokenizer(byte_model).encode
    for token in encode("ab", special=False):
        advance([(matcher, token) for matcher in together])
        for one, other in zip(together, alone):
            other.advance(token)
            assert (one.bits, one.error, one.ready) == (other.bits, None, True)
    [c, q] = encode("cq", special=False)
    advance([(together[0], c), (together[1], q), (together[2], c)])
    assert [bool(matcher.error) for matcher in together] == [False, True, False]
    assert all(matcher.ready for matcher in together)
    [x] = encode("x", special=False)
    assert int.from_bytes(together[0].bits, "little") == 1 << x, "nothing else may come"
    assert int.from_bytes(together[2].bits, "little") == 1 << EOS | 1 << VOCAB + 40


def test_a_model_without_an_end_of_text_is_served_but_not_with_grammars(byte_model: Path) -> None:
    for json_text, ends in ((Tokenizer(byte_model).json, {VOCAB + 1}), ('{"unheard": "of"}', {EOS})):
        without = Grammars(json_text, vocab_size=VOCAB, eos_token_ids=ends)
        with pytest.raises(RequestError, match="cannot be had"):
            without.wait(wish({"regex": "a"}))


def test_a_library_that_is_missing_is_said_to_who_asks_for_a_grammar(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    without = Grammars(Tokenizer(byte_model).json, vocab_size=VOCAB, eos_token_ids={EOS})
    with pytest.raises(RequestError, match="pip install llguidance"):
        without.wait(wish({"regex": "a"}))


def test_the_library_is_loaded_in_a_thread_of_its_own_and_not_before_it_is_needed() -> None:
    code = (
        "import sys, aiolora.engine.build, aiolora.llm, aiolora.api.app\n"
        "from aiolora.engine.grammar import Grammars\n"
        "grammars = Grammars('{}', vocab_size=3, eos_token_ids=[1])\n"
        "assert 'llguidance' not in sys.modules\n"
        "grammars.load().result()\n"
        "assert 'llguidance' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_may_have_more_tokens_than_its_tokenizer(byte_model: Path) -> None:
    wide = Grammars(Tokenizer(byte_model).json, vocab_size=1000, eos_token_ids={EOS})
    compiled = wide.wait(wish({"regex": "a"}))
    assert compiled is not None
    bits = compiled.begin().bits
    assert len(bits) == 4 * -(-1000 // 32)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, threading.Event]]:
    """By regular expression: compiled only when its gate is open. All are opened in the end."""
    gates: dict[str, threading.Event] = {}
    compiled = grammar._compile

    def gated(tokenizer: Any, wish: tuple[str, str]) -> CompiledGrammar | str:
        if wish[1] in gates:
            gates[wish[1]].wait(60)
        return compiled(tokenizer, wish)

    monkeypatch.setattr(grammar, "_compile", gated)
    yield gates
    for gate in gates.values():
        gate.set()


async def test_a_grammar_that_takes_long_is_refused_and_the_loop_does_not_wait(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch, gates: dict[str, threading.Event]
) -> None:
    async with AsyncLLMEngine(EngineArgs(model=str(byte_model), **ARGS)) as engine:
        whole = await engine.generate("a", wish(SHAPES["json"][0]))
        json.loads(whole.outputs[0].text)
        monkeypatch.setattr(grammar, "COMPILE_TIMEOUT_S", 0.05)
        gates["a"] = threading.Event()
        slow = asyncio.ensure_future(engine.generate("a", wish({"regex": "a"})))
        meanwhile = await engine.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(meanwhile.outputs[0].token_ids) == 3
        with pytest.raises(RequestError, match=r"within 0\.05 s"):
            await slow
        gates["a"].set()
        await asyncio.wrap_future(engine._parts.grammars._cache["regex", "a"].done)
        assert (await engine.generate("a", wish({"regex": "a"}))).outputs[0].text == "a", "it was compiled all the same"


async def test_slow_grammars_of_one_owner_neither_fail_nor_delay_those_of_another(
    grammars: Grammars, gates: dict[str, threading.Event]
) -> None:
    gates |= {f"{number}": threading.Event() for number in range(8)}
    slow = [asyncio.ensure_future(grammars.take(wish({"regex": text}), "hog")) for text in gates]
    assert await grammars.take(wish({"regex": "b"}), "other") is not None
    same = asyncio.ensure_future(grammars.take(wish({"regex": "7"}), "other"))  # of which the hog's turn is far
    await asyncio.sleep(0.01)
    gates["7"].set()
    assert await same is not None
    assert not any(task.done() for task in slow)
    for gate in gates.values():
        gate.set()
    assert (await asyncio.gather(*slow))[7] is await same, "compiled once"


async def test_the_time_that_a_grammar_waits_for_its_turn_is_not_counted(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, gates: dict[str, threading.Event]
) -> None:
    await asyncio.wrap_future(grammars.load())
    monkeypatch.setattr(grammar, "COMPILE_TIMEOUT_S", 0.5)
    gates["a"] = threading.Event()
    slow = asyncio.ensure_future(grammars.take(wish({"regex": "a"})))
    waits = asyncio.ensure_future(grammars.take(wish({"regex": "b"})))
    with pytest.raises(RequestError, match=r"within 0\.5 s"):
        await slow
    assert not waits.done()
    gates["a"].set()
    assert await waits is not None


async def test_too_many_grammars_in_a_line_are_refused_and_equal_ones_count_once(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, gates: dict[str, threading.Event]
) -> None:
    monkeypatch.setattr(grammar, "MAX_WAITING", 2 * grammar._LEAST)
    grammars = Grammars(grammars._read.args[0], vocab_size=VOCAB, eos_token_ids={EOS})
    await asyncio.wrap_future(grammars.load())
    gates["a"] = threading.Event()
    line = [asyncio.ensure_future(grammars.take(wish({"regex": text}), "hog")) for text in ("a", "b", "b", "c", "c")]
    await asyncio.sleep(0)
    with pytest.raises(GrammarBusyError, match=f"{3 * grammar._LEAST} characters .* limit is {2 * grammar._LEAST}"):
        await grammars.take(wish({"regex": "d"}), "hog")
    assert await grammars.take(wish({"regex": "d"}), "other") is not None
    gates["a"].set()
    assert None not in await asyncio.gather(*line)
    assert await grammars.take(wish({"regex": "e"}), "hog") is not None


async def test_an_adapter_that_goes_while_a_grammar_is_compiled_still_answers_who_asked_before(
    byte_model: Path, adapter: LoRARequest, gates: dict[str, threading.Event]
) -> None:
    async with AsyncLLMEngine(EngineArgs(model=str(byte_model), **ARGS)) as engine:
        version = await engine.add_lora(adapter)
        gates["a"] = threading.Event()
        asked = asyncio.ensure_future(engine.generate("a", wish({"regex": "a"}), lora="a"))
        await asyncio.sleep(0)
        assert await engine.remove_lora("a")
        with pytest.raises(UnknownModelError):
            await engine.generate("a", wish({"regex": "a"}), lora="a")
        assert not asked.done()
        gates["a"].set()
        assert (await asked).adapter == version.label


async def test_a_grammar_that_fails_on_the_way_fails_its_request_alone(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_LIMITS", {"step_lexer_fuel": 1, "verbose_errors": False})
    async with AsyncLLMEngine(EngineArgs(model=str(byte_model), **ARGS)) as engine:
        results = await asyncio.gather(
            engine.generate("a", wish({"regex": "(a|b)*c(a|b){9}[x-z]+"}, max_tokens=50)),
            engine.generate("a", SamplingParams(max_tokens=30, ignore_eos=True)),
            return_exceptions=True,
        )
        assert isinstance(results[0], (GrammarError, RequestError))
        assert isinstance(results[1], RequestOutput)
        assert engine.death is None
