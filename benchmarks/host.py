"""What a token costs on the host between the engine's step and its caller: `Assembler.feed`, in one thread.

    python -m benchmarks.host [--model smollm2-135m] [--streams 256] [--out results]

English text and random tokens, without and with stop strings and log-probabilities; "window" forces the stream that
tokenizers without a byte-level decoder take. Every text is held against decoding its tokens at once.
"""

import argparse
import random
import time
from pathlib import Path

from aiolora.engine.output import Assembler
from aiolora.models.weights import locate
from aiolora.tokenizer import Tokenizer
from aiolora.types import Request, SamplingParams, TokenDelta
from benchmarks.harness import Result, write

TEXT = Path(__file__).parent.parent / "docs/architecture.md"


def feed_us(tokenizer: Tokenizer, prompt: list[int], answers: list[list[int]], **params: object) -> float:
    """Microseconds of the thread for one `feed`, answers taken in turns as a step brings them."""
    chosen = SamplingParams(max_tokens=len(answers[0]), **params)  # type: ignore[arg-type]
    assemblers = [
        Assembler(Request(id=str(number), prompt_token_ids=tuple(prompt), params=chosen), tokenizer)
        for number in range(len(answers))
    ]
    steps = [
        [
            TokenDelta(
                request_id=str(number), index=0, token_id=token, logprob=-1.0, rank=1, top=((5, -1.0), (6, -2.0))
            )
            for number, token in enumerate(tokens)
        ]
        for tokens in zip(*answers)
    ]
    start = time.thread_time()
    for deltas in steps:
        for assembler, delta in zip(assemblers, deltas):
            assembler.feed(delta)
    took = time.thread_time() - start
    for assembler, answer in zip(assemblers, answers):
        whole = tokenizer.decode(answer, skip_special=True)
        shown = assembler.output().outputs[0].text
        if not whole.startswith(shown) or len(whole) - len(shown) > 8:  # what may begin a stop string is held back
            raise SystemExit(f"WRONG: {shown!r} is not {whole!r}")
    return took / len(answers) / len(steps) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    tokenizer, chance = Tokenizer(locate(args.model)), random.Random(0)
    ids = tokenizer.encode(TEXT.read_text())
    long = ids * (args.streams * 13 // len(ids) + args.tokens // len(ids) + 2)
    text = [long[13 * number : 13 * number + args.tokens] for number in range(args.streams)]
    noise = [[chance.choice(ids) for _ in range(args.tokens)] for _ in range(args.streams)]
    prompt = tokenizer.encode("A prompt.")
    cases: dict[str, tuple[list[list[int]], dict[str, object]]] = {
        "text": (text, {}),
        "shuffled tokens": (noise, {}),
        "text, 2 stop strings": (text, {"stop": ["##END", "\nUser:"]}),
        "text, 2 log-probabilities": (text, {"logprobs": 2}),
    }
    results = []
    fast = tokenizer._bytes
    for kind, known in (("bytes", fast), ("window", None)):
        if kind == "bytes" and fast is None:
            continue
        tokenizer._bytes = known
        for name, (answers, params) in cases.items():
            best = min(feed_us(tokenizer, prompt, answers, **params) for _ in range(args.repeat))
            results.append(Result(f"{kind}: {name}", best, "us a token", f"best of {args.repeat}"))
    write(results, args.out / "host.csv")


if __name__ == "__main__":
    main()
