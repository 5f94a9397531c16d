"""aiolora against transformers + PEFT on the CPU, in one run: the embedded model, bfloat16, greedy.

    python -m benchmarks.cpu [--tokens 64] [--dtype bfloat16] [--out results/cpu.csv]

Rows: one stream of the base and of an adapter; 8 requests over 4 adapters (PEFT: `adapter_names`, its mixed batch);
what LoRA costs at batch 8 over the base; how far a step is from reading its bytes once. Every engine's answers are
checked in the same run: the log-probability that transformers + PEFT gives our tokens, teacher-forced.
"""

import argparse
import cProfile
import gc
import pstats
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aiolora import LLM, LoRARequest, RequestOutput, SamplingParams
from aiolora.models.weights import locate
from benchmarks.harness import Result, machine, median, medians, read_bandwidth, write

MODEL = "smollm2-135m"
ROOT = Path(__file__).parent.parent
ADAPTERS = {
    "sql": ROOT / "examples/adapters/sql",
    "json": ROOT / "examples/adapters/json",
    "pirate": ROOT / "examples/adapters/pirate",
    "e-rspat": ROOT / "tests/data/adapters/e-rspat",
}
PROMPT = "Tell me about the {} that lives by the sea and what it does all day."
PROMPTS = [PROMPT.format(word) for word in ("cat", "dog", "gull", "crab", "seal", "fox", "owl", "man")]


class Ours:
    """The engine under test."""

    def __init__(self, dtype: str, *, enable_lora: bool = True) -> None:
        self._llm = LLM(
            MODEL, dtype=dtype, enable_lora=enable_lora, max_num_seqs=8, max_model_len=1024, enable_prefix_caching=False
        )

    def run(self, prompts: list[str], adapters: list[str | None], tokens: int) -> list[RequestOutput]:
        names = list(ADAPTERS)
        loras = [name and LoRARequest(name, names.index(name) + 1, str(ADAPTERS[name])) for name in adapters]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        return self._llm.generate(prompts, params, lora_request=loras, use_tqdm=False)


class Theirs:
    """transformers, with the adapters under PEFT."""

    def __init__(self, dtype: str) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = locate(MODEL)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        first, *others = ADAPTERS
        self.peft: Any = None
        self._peft = lambda: PeftModel.from_pretrained(self.base, ADAPTERS[first], adapter_name=first)
        self._others = others

    def attach(self) -> None:
        """From here on the model carries the adapters (which slows its base down, so the base is measured before)."""
        self.peft = self._peft().eval()
        for name in self._others:
            self.peft.load_adapter(ADAPTERS[name], adapter_name=name)

    @torch.inference_mode()
    def run(self, prompts: list[str], adapters: list[str | None], tokens: int) -> torch.Tensor:
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True)
        mixed = {} if self.peft is None else {"adapter_names": [name or "__base__" for name in adapters]}
        model = self.base if self.peft is None else self.peft
        out: torch.Tensor = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=2, **mixed
        )
        return out

    @torch.inference_mode()
    def logprob_gap(self, outputs: list[RequestOutput], adapters: list[str | None]) -> float:
        """Mean absolute difference between our log-probabilities and theirs of the same tokens."""
        gaps = []
        for output, name in zip(outputs, adapters):
            ids, answer = output.prompt_token_ids, output.outputs[0]
            mixed = {} if self.peft is None else {"adapter_names": [name or "__base__"]}
            model = self.base if self.peft is None else self.peft
            logits = model(torch.tensor([[*ids, *answer.token_ids]]), **mixed).logits[0].float()
            wanted = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(answer.token_ids).unsqueeze(1))
            assert answer.logprobs is not None
            mine = torch.tensor([top[token].logprob for top, token in zip(answer.logprobs, answer.token_ids)])
            gaps.append((wanted.squeeze(1) - mine).abs().mean())
        return float(torch.stack(gaps).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="only profile one run of 8 requests over 4 adapters")
    parser.add_argument("--out", type=Path, default=Path("results/cpu.csv"))
    args = parser.parse_args()
    tokens, eight = args.tokens, PROMPTS
    none: list[str | None] = [None] * 8
    mix: list[str | None] = [name for name in ADAPTERS for _ in range(2)]
    print(machine(), flush=True)

    def pace(engine: Ours | Theirs, prompts: list[str], adapters: list[str | None]) -> float:
        """Tokens a second."""
        return len(prompts) * tokens / median(lambda: engine.run(prompts, adapters, tokens), repeat=args.repeat)

    def steps_of(engine: Ours, cases: dict[str, tuple[list[str], list[str | None]]]) -> dict[str, float]:
        """Seconds of a step of each case: (time of all tokens - time of the first) / the rest."""
        runs = {
            f"{name} {count}": partial(engine.run, prompts, adapters, count)
            for name, (prompts, adapters) in cases.items()
            for count in (1, tokens)
        }
        took = medians(runs, repeat=2 * args.repeat + 1)
        return {name: (took[f"{name} {tokens}"] - took[f"{name} 1"]) / (tokens - 1) for name in cases}

    bandwidth = read_bandwidth()
    results = [Result("memory read bandwidth", bandwidth / 1e9, "GB/s", "torch.sum over 1 GiB")]
    ours = Ours(args.dtype)
    if args.profile:
        ours.run(eight, mix, tokens)
        with cProfile.Profile() as profile:
            ours.run(eight, mix, tokens)
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)
        return
    ones = {name: pace(ours, eight[:1], [name]) for name in (None, "sql")}
    eights = {"base": pace(ours, eight, none), "4 adapters": pace(ours, eight, mix)}
    steps = steps_of(ours, {"one": (eight[:1], [None]), "base": (eight, none), "lora": (eight, mix)})
    outputs = [ours.run(eight, none, tokens), ours.run(eight, mix, tokens)]
    del ours
    gc.collect()
    theirs = Theirs(args.dtype)
    their_one = pace(theirs, eight[:1], [None])
    their_eight = pace(theirs, eight, none)
    gap_base = theirs.logprob_gap(outputs[0], none)
    theirs.attach()
    their_sql = pace(theirs, eight[:1], ["sql"])
    their_mix = pace(theirs, eight, mix)
    gap_mix = theirs.logprob_gap(outputs[1], mix)
    weights = (locate(MODEL) / "model.safetensors").stat().st_size * (2 if args.dtype == "float32" else 1)

    def row(name: str, mine: float, other: float, bar: str) -> list[Result]:
        return [
            Result(f"{name}: aiolora", mine, "tokens/s"),
            Result(f"{name}: transformers + PEFT", other, "tokens/s"),
            Result(f"{name}: ratio", mine / other, "x", bar),
        ]

    results += row("1 stream, base", ones[None], their_one, "bar: 2x")
    results += row("1 stream, adapter sql", ones["sql"], their_sql, "bar: 2x")
    results += row("8 requests, base", eights["base"], their_eight, "")
    results += row("8 requests over 4 adapters", eights["4 adapters"], their_mix, "bar: 4x")
    results += [
        Result("step of 8 rows, base", steps["base"] * 1e3, "ms"),
        Result("step of 8 rows, 4 adapters", steps["lora"] * 1e3, "ms"),
        Result("LoRA over base at batch 8", (steps["lora"] / steps["base"] - 1) * 100, "%", "bar: 15 %"),
        Result("step of 1 row, base", steps["one"] * 1e3, "ms"),
        Result("weights read once at that bandwidth", weights / bandwidth * 1e3, "ms", f"{weights / 1e6:.0f} MB"),
        Result("mean |logprob difference|, base", gap_base, "nat", "the same tokens, teacher-forced"),
        Result("mean |logprob difference|, 4 adapters", gap_mix, "nat", "the same tokens, teacher-forced"),
    ]
    write(results, args.out)
    worst = max(gap_base, gap_mix)
    limit = 0.05 if args.dtype == "bfloat16" else 1e-3
    if worst > limit:
        raise SystemExit(f"WRONG: mean |logprob difference| {worst:.4f} is over {limit}")


if __name__ == "__main__":
    main()
