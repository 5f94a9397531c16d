"""Session: one engine under measurement through its blocking face, with prompts that nobody has seen before."""

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from aiolora import LLM, AsyncLLMEngine, LoRARequest, RequestOutput, SamplingParams
from aiolora.engine.core import Engine
from aiolora.lora.loader import AdapterWeights
from benchmarks.reference import Check, Reference
from benchmarks.shapes import SHAPES

Loras = Sequence[LoRARequest | None]


class Session:
    """An engine, its prompts, and what its last timed run answered."""

    def __init__(
        self,
        folder: str,
        name: str,
        *,
        dtype: str = "bfloat16",
        seed: int = 0,
        kv_tokens: int = 256 * 1024,
        **args: Any,
    ) -> None:
        shape = SHAPES[name]
        start = time.perf_counter()
        self.llm = LLM(
            folder,
            load_format="dummy",
            dtype=dtype,
            max_num_seqs=256,
            max_model_len=2048,
            kv_cache_memory=kv_tokens * shape.kv_nbytes * (2 if dtype == "float32" else 1),
            **args,
        )
        self.start_s = time.perf_counter() - start
        self.name = name
        self._vocab = shape.vocab
        self._random = random.Random(seed)
        self._reference: Reference | None = None
        self._last: tuple[list[RequestOutput], list[LoRARequest | None]] = ([], [])

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random ids, other ones each time: no prefix is ever met again."""
        return [[self._random.randrange(300, self._vocab) for _ in range(length)] for _ in range(count)]

    def run(self, loras: Loras, inputs: int, outputs: int, *, prompts: list[list[int]] | None = None) -> float:
        """Seconds of one batch: a request for each of `loras`, greedy, to its full length."""
        prompts = prompts or self.prompts(len(loras), inputs)
        params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True)
        start = time.perf_counter()
        answers = self.llm.generate(prompts, params, lora_request=list(loras), use_tqdm=False)
        took = time.perf_counter() - start
        self.keep(answers, loras)
        return took

    def keep(self, answers: list[RequestOutput], loras: Loras) -> None:
        """What `check` looks at."""
        self._last = (answers, list(loras))

    def step_ms(self, loras: Loras, *, inputs: int = 128, outputs: int = 256, repeat: int = 3) -> float:
        """A decode step: (time of all tokens - time of the first) / the others, median."""
        self.run(loras, inputs, min(outputs, 8))
        return statistics.median(self.step_once(loras, inputs, outputs) for _ in range(repeat))

    def step_once(self, loras: Loras, inputs: int, outputs: int) -> float:
        first = self.run(loras, inputs, 1)
        return (self.run(loras, inputs, outputs) - first) / (outputs - 1) * 1e3

    def pace(self, loras: Loras, inputs: int, outputs: int, *, repeat: int = 2) -> float:
        """Output tokens a second, the best of `repeat`."""
        return len(loras) * outputs / min(self.run(loras, inputs, outputs) for _ in range(repeat))

    def check(self, requests: int = 3) -> Check:
        """Some answers of the last run against the reference, of different adapters where it had several."""
        answers, loras = self._last
        picked = list({(lora and lora.lora_name): number for number, lora in enumerate(loras)}.values())
        picked += [number for number in range(len(loras)) if number not in picked]
        picked = picked[:: max(1, len(picked) // requests)][:requests]
        if self._reference is None:
            self._reference = reference_of(self.llm, self.name)
        return self._reference.check([answers[number] for number in picked], [loras[number] for number in picked])

    @property
    def answers(self) -> list[RequestOutput]:
        """Of the last run."""
        return self._last[0]

    # what no face shows: looked for here alone

    @property
    def core(self) -> Engine:
        return core_of(self.llm)

    def weights_of(self, lora: LoRARequest) -> AdapterWeights:
        return self.llm.engine._built.load(lora)


def core_of(engine: LLM | AsyncLLMEngine) -> Engine:
    if isinstance(engine, LLM):
        return engine.engine._engine
    assert engine._built is not None, "it was not started"
    return engine._built.engine


def reference_of(engine: LLM | AsyncLLMEngine, name: str) -> Reference:
    """The plain decoder over the weights of `engine`, which has the shape `name`."""
    return Reference(core_of(engine)._runner._model, name)  # type: ignore[attr-defined]
