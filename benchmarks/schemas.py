"""JSON schemas at random: whether every answer at temperature 1 parses and validates, and what they cost neighbours.

    python -m benchmarks.schemas [--count 1000] [--model smollm2-135m] [--dtype auto]
    python -m benchmarks.schemas --neighbours [--rows 8] [--tokens 64]

The schemas nest up to three deep: objects, lists, choices, references, enums, patterns, formats, bounds; each third
answer is an adapter's. `--neighbours`: rows without a grammar, beside as many with one and beside as many without, in
turns.
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema

from aiolora import LLM, LoRARequest, SamplingParams, StructuredOutputsParams
from benchmarks.harness import Result, machine, medians, write

ADAPTER = Path(__file__).parent.parent / "examples/adapters/json"
WORDS = ("id", "name", "tags", "über", "a b", 'say "hi"', "x/y~z", "size", "on", "line\nbreak")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def draw(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`count` different schemas, the same ones for the same seed.

    Texts and lists are bounded; a number, or the fraction of a second, may go on until an answer is cut.
    """
    rng = random.Random(seed)
    drawn: dict[str, dict[str, Any]] = {}
    while len(drawn) < count:
        schema = _schema(rng, depth=rng.choice((0, 1, 2, 3)))
        drawn.setdefault(json.dumps(schema, sort_keys=True), schema)
    return list(drawn.values())


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    makers = _NESTING if depth > 0 and rng.random() < 0.8 else _LEAVES
    return rng.choice(makers)(rng, depth)


def _scalar(rng: random.Random) -> Any:
    return rng.choice((None, True, False, rng.randrange(-99, 99), round(rng.uniform(-9, 9), 2), rng.choice(WORDS)))


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randrange(4)
    kinds: list[dict[str, Any]] = [
        {"minLength": low, "maxLength": low + rng.randrange(1, 12)},
        {"maxLength": rng.randrange(1, 20)},
        {"pattern": rng.choice(("^[a-z]{2,8}$", r"^\d{3}-\d{4}$", "^(yes|no){1,3}!$", "^[A-F0-9]{4}$"))},
        {"format": rng.choice(("date", "time", "date-time", "uuid", "ipv4"))},
    ]
    return {"type": "string", **rng.choice(kinds)}


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randrange(-999, 999)
    bounds = rng.choice(({"minimum": low, "maximum": low + rng.randrange(1, 5000)}, {"exclusiveMinimum": low}, {}))
    kind = rng.choice(("integer", "integer", "number")) if bounds else rng.choice(("boolean", "null", "integer"))
    return {"type": kind, **bounds, **({"multipleOf": 5} if kind == "integer" and not bounds else {})}


def _enum(rng: random.Random, _: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"const": _scalar(rng)}
    return {"enum": [_scalar(rng) for _ in range(rng.randrange(1, 6))]}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randrange(1, 5))
    more: Any = False if rng.random() < 0.8 else {"type": "boolean"}
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth - 1) for name in names},
        "required": names if more else rng.sample(names, rng.randrange(len(names) + 1)),
        "additionalProperties": more,
        **({"maxProperties": len(names) + 1} if more else {}),
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(3)
    bounds = {"minItems": low, "maxItems": low + rng.randrange(1, 3)}
    if rng.random() < 0.2:
        return {"type": "array", "prefixItems": [_schema(rng, depth - 1) for _ in range(2)], "items": False}
    return {"type": "array", "items": _schema(rng, depth - 1), **bounds}


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randrange(2, 4))]}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    """Only at the root do definitions hold, so inside it is the plain schema."""
    inner = _schema(rng, depth - 1)
    if depth < 3 or "$defs" in json.dumps(inner):
        return inner
    pair = {"left": {"$ref": "#/$defs/thing"}, "right": {"$ref": "#/$defs/thing"}}
    return {
        "$defs": {"thing": inner},
        "type": "object",
        "properties": pair,
        "required": ["left"],
        "additionalProperties": False,
    }


_LEAVES = (_string, _string, _number, _number, _enum)
_NESTING = (_object, _object, _object, _array, _choice, _reference)


def faults(llm: LLM, schemas: list[dict[str, Any]], *, lora: LoRARequest | None = None, **params: Any) -> list[str]:
    """What is wrong with the answers to `schemas`, at temperature 1, each with its finish reason ("length": cut)."""
    wishes = [
        SamplingParams(temperature=1.0, seed=number, structured_outputs=StructuredOutputsParams(json=schema), **params)
        for number, schema in enumerate(schemas)
    ]
    prompts = [f"An example of {json.dumps(schema)} is:" for schema in schemas]
    loras = [lora if number % 3 == 0 else None for number in range(len(schemas))]
    found = []
    for schema, output in zip(schemas, llm.generate(prompts, wishes, lora_request=loras, use_tqdm=False)):
        answer = output.outputs[0]
        try:
            jsonschema.validate(json.loads(answer.text), schema)
        except (json.JSONDecodeError, jsonschema.ValidationError) as error:
            found.append(f"{answer.finish_reason}: {error.args[0]}: {json.dumps(schema)} -> {answer.text!r}"[:600])
    return found


def _validate(args: argparse.Namespace) -> None:
    schemas = draw(args.count)
    print(machine())
    print(f"{len(schemas)} schemas: {dict(Counter(str(s.get('type', next(iter(s)))) for s in schemas))}")
    llm = LLM(args.model, dtype=args.dtype, enable_lora=True, max_num_seqs=32, max_model_len=2048)
    lora = LoRARequest("json", 1, str(ADAPTER)) if args.model == "smollm2-135m" else None
    start = time.perf_counter()
    wrong: list[str] = []
    for low in range(0, len(schemas), 100):
        wrong += faults(llm, schemas[low : low + 100], lora=lora, max_tokens=1024)
        print(f"{low + 100}: {len(wrong)} wrong, {time.perf_counter() - start:.0f} s", flush=True)
    print("\n".join(wrong))
    cut = sum(one.startswith("length") for one in wrong)
    print(
        f"{len(schemas)} answers: {len(schemas) - len(wrong)} parse and validate, {cut} were cut by max_tokens or the"
    )
    print(f"context before their end, {len(wrong) - cut} ended and are wrong")
    raise SystemExit(len(wrong) > cut)


def _neighbours(args: argparse.Namespace) -> None:
    llm = LLM(args.model, dtype=args.dtype, max_num_seqs=2 * args.rows, max_model_len=1024, enable_prefix_caching=False)
    free = SamplingParams(temperature=1.0, seed=1, max_tokens=args.tokens, ignore_eos=True)
    longest = {"type": "array", "items": PERSON, "minItems": 50}
    bound = SamplingParams(
        temperature=1.0, seed=1, max_tokens=args.tokens, structured_outputs=StructuredOutputsParams(json=longest)
    )

    def run(others: SamplingParams) -> None:
        """Until the rows without a grammar have ended, whatever the others do."""
        engine, left = llm.engine, args.rows
        for number in range(args.rows):
            engine.add_request(f"free {number}", "Tell me of the sea.", free)
            engine.add_request(f"other {number}", "People, as JSON:", others)
        while left:
            left -= sum(output.finished and output.request_id.startswith("free") for output in engine.step())
        for number in range(args.rows):
            engine.abort_request(f"other {number}")

    times = medians({"free": lambda: run(free), "bound": lambda: run(bound)}, repeat=args.repeat)
    steps = args.tokens
    results = [
        Result(f"a step of {args.rows} rows beside {args.rows} without a grammar", times["free"] / steps * 1e3, "ms"),
        Result(f"a step of {args.rows} rows beside {args.rows} with one", times["bound"] / steps * 1e3, "ms"),
        Result("slower", (times["bound"] / times["free"] - 1) * 100, "%"),
    ]
    write(results, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--neighbours", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/neighbours.csv"))
    args = parser.parse_args()
    (_neighbours if args.neighbours else _validate)(args)


if __name__ == "__main__":
    main()
