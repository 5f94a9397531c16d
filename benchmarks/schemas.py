"""JSON schemas at random: whether every answer at temperature 1 parses and validates, and what they cost neighbours.

    python -m benchmarks.schemas [--schemas 1000] [--rows 32] [--model smollm2-135m] [--device auto] [--dtype auto]
    python -m benchmarks.schemas --write schemas.jsonl; python -m benchmarks.schemas --read schemas.jsonl
    python -m benchmarks.schemas --neighbours [--rows 8] [--tokens 64]

Each third answer is an adapter's. Every answer is a line of the CSV (`--out`) as soon as it has ended, and a run that
was stopped goes on where it was when it is called again. `--neighbours`: rows without a grammar, beside as many with
one and beside as many without, in turns.
"""

import argparse
import csv
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema

from aiolora import LLM, LoRARequest, SamplingParams, StructuredOutputsParams
from aiolora.errors import GrammarError, RequestError
from benchmarks.harness import Result, machine, medians, write
from benchmarks.random_schemas import draw, read_schemas, write_schemas

ADAPTER = Path(__file__).parent.parent / "examples/adapters/json"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# cut: by max_tokens or the context before its end; wrong: ended, and does not validate; refused: by the compiler
VERDICTS = ("valid", "cut", "wrong", "refused")
_AHEAD = 2  # as many requests as rows are under way, so that no row is ever empty
_PROMPT = 1024  # tokens of the longest prompt


class Answer(NamedTuple):
    """What became of one schema: a line of the CSV."""

    number: int
    verdict: str  # one of VERDICTS
    tokens: int
    why: str  # empty: it is valid
    schema: str  # JSON
    text: str  # JSON of the text: a line whatever it holds


def answers(
    llm: LLM, schemas: Mapping[int, Any], *, rows: int, lora: LoRARequest | None = None, **params: Any
) -> Iterator[Answer]:
    """The answers to `schemas`, by their numbers, at temperature 1, each as soon as it has ended.

    A number alone decides the seed and, every third, the adapter: an answer is the same in whatever run it is made.
    """
    engine, left, asked = llm.engine, list(schemas.items()), set[int]()
    left.reverse()
    while left or asked:
        while left and len(asked) < _AHEAD * rows:
            number, schema = left.pop()
            form = StructuredOutputsParams(json=schema)
            wish = SamplingParams(temperature=1.0, seed=number, structured_outputs=form, **params)
            prompt = f"An example of {json.dumps(schema)} is:"
            try:
                engine.add_request(str(number), prompt, wish, lora if number % 3 == 0 else None)
            except RequestError as error:
                yield Answer(number, "refused", 0, _line(error), json.dumps(schema), "")
            else:
                asked.add(number)
        try:
            ended = [output for output in engine.step() if output.finished]
        except GrammarError as error:  # says whose: the others go on
            number = next(number for number in asked if f"request '{number}':" in str(error))
            asked.remove(number)
            yield Answer(number, "refused", 0, _line(error), json.dumps(schemas[number]), "")
            continue
        for output in ended:
            number, one = int(output.request_id), output.outputs[0]
            asked.remove(number)
            verdict, why = _judge(one.text, schemas[number], one.finish_reason)
            yield Answer(number, verdict, len(one.token_ids), why, json.dumps(schemas[number]), json.dumps(one.text))


def _judge(text: str, schema: Any, finish_reason: str | None) -> tuple[str, str]:
    """The verdict, and why it is not "valid"."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (json.JSONDecodeError, jsonschema.ValidationError) as error:
        return ("cut" if finish_reason == "length" else "wrong"), _line(error)
    return "valid", ""


def _line(error: Exception) -> str:
    return " ".join(str(error.args[0]).split())


def _validate(args: argparse.Namespace) -> None:
    schemas = read_schemas(args.read) if args.read else draw(args.schemas)
    if args.write:
        write_schemas(schemas, args.write)
        print(f"{len(schemas)} schemas -> {args.write}")
        return
    digest = sha256(json.dumps(schemas).encode()).hexdigest()[:12]
    said = f"# schemas {digest}, {args.model}, {args.dtype}, at most {args.max_tokens} tokens"
    told = resume(args.out, said)
    print(machine())
    print(f"{len(schemas)} schemas, {len(told)} of them answered before", flush=True)
    left = {number: schema for number, schema in enumerate(schemas) if number not in told}
    if left:
        sizes = {"max_num_seqs": args.rows, "max_model_len": args.max_tokens + _PROMPT}
        llm = LLM(args.model, device=args.device, dtype=args.dtype, enable_lora=True, **sizes)
        lora = LoRARequest("json", 1, str(ADAPTER)) if args.model == "smollm2-135m" else None
        start = time.perf_counter()
        with args.out.open("a") as stream:
            for answer in answers(llm, left, rows=args.rows, lora=lora, max_tokens=args.max_tokens):
                csv.writer(stream).writerow(answer)
                stream.flush()
                told[answer.number] = answer
                if len(told) % 25 == 0:
                    print(f"{len(told)}: {counts(told)}, {time.perf_counter() - start:.0f} s", flush=True)
    for answer in told.values():
        if answer.verdict in ("cut", "wrong"):
            print(f"{answer.verdict} {answer.number}: {answer.why}: {answer.schema} -> {answer.text}"[:600])
    for why, count in Counter(answer.why for answer in told.values() if answer.verdict == "refused").most_common():
        print(f"refused {count}: {why}")
    print(f"{len(told)} schemas: {counts(told)} -> {args.out}")
    raise SystemExit(any(answer.verdict == "wrong" for answer in told.values()))


def resume(file: Path, said: str) -> dict[int, Answer]:
    """The answers that `file` has, by number; one that was being written when a run was stopped is cut off.

    A new file begins with `said`. Raises `SystemExit` for the file of a run that said something else.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    if lines and lines[0].rstrip() != said:
        raise SystemExit(f"{file} is of another run ({lines[0].strip()}); give another --out, or remove it")
    whole = [line for line in lines if line.endswith("\n")] or [f"{said}\n"]
    file.write_text("".join(whole))
    return {int(row[0]): Answer(int(row[0]), row[1], int(row[2]), *row[3:]) for row in csv.reader(whole[1:])}


def counts(told: Mapping[int, Answer]) -> str:
    """How many there are of each verdict."""
    found = Counter(answer.verdict for answer in told.values())
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS)


def _neighbours(args: argparse.Namespace) -> None:
    llm = LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        max_num_seqs=2 * args.rows,
        max_model_len=1024,
        enable_prefix_caching=False,
    )
    free = SamplingParams(temperature=1.0, seed=1, max_tokens=args.tokens, ignore_eos=True)
    longest = {"type": "array", "items": PERSON, "minItems": 50}
    bound = SamplingParams(
        temperature=1.0, seed=1, max_tokens=args.tokens, structured_outputs=StructuredOutputsParams(json=longest)
    )

    spent: dict[str, list[float]] = {"free": [], "bound": []}  # processor time of this thread, which steps

    def run(name: str, others: SamplingParams) -> None:
        """Until the rows without a grammar have ended, whatever the others do."""
        engine, left, start = llm.engine, args.rows, time.thread_time()
        for number in range(args.rows):
            engine.add_request(f"free {number}", "Tell me of the sea.", free)
            engine.add_request(f"other {number}", "People, as JSON:", others)
        while left:
            left -= sum(output.finished and output.request_id.startswith("free") for output in engine.step())
        for number in range(args.rows):
            engine.abort_request(f"other {number}")
        spent[name].append(time.thread_time() - start)

    times = medians({"free": lambda: run("free", free), "bound": lambda: run("bound", bound)}, repeat=args.repeat)
    cpu = {name: statistics.median(values[1:]) for name, values in spent.items()}
    per_step = 1e3 / args.tokens
    results = [
        Result(f"a step of {args.rows} rows beside {args.rows} without a grammar", times["free"] * per_step, "ms"),
        Result(f"a step of {args.rows} rows beside {args.rows} with one", times["bound"] * per_step, "ms"),
        Result("slower", (times["bound"] / times["free"] - 1) * 100, "%"),
        Result("slower by the processor time of the thread that steps", (cpu["bound"] / cpu["free"] - 1) * 100, "%"),
    ]
    write(results, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--write", type=Path, help="only draw the schemas, and write them to this file, one a line")
    parser.add_argument("--read", type=Path, help="take the schemas of this file instead")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--neighbours", action="store_true")
    parser.add_argument("--rows", type=int, help="in a step; 32, and with --neighbours 8 of each")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="results/schemas.csv, or results/neighbours.csv")
    args = parser.parse_args()
    args.rows = args.rows or (8 if args.neighbours else 32)
    args.out = args.out or Path("results", "neighbours.csv" if args.neighbours else "schemas.csv")
    (_neighbours if args.neighbours else _validate)(args)


if __name__ == "__main__":
    main()
