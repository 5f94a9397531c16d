"""One start in a process of its own, told as JSON for `benchmarks.start`. Nothing is imported before the clock runs."""

import argparse
import json
import logging
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any


class Clock:
    """Seconds since the process was started, by what went on."""

    def __init__(self, born: float) -> None:
        self.took: dict[str, float] = {}
        self._since = born

    def over(self, what: str) -> None:
        now = time.time()
        self.took[what] = now - self._since
        self._since = now


class Kernels:
    """What Triton compiled or found, as it tells itself."""

    def __init__(self) -> None:
        self.found = 0
        self.seconds: Counter[str] = Counter()  # by stage, of all threads
        self.each: list[tuple[float, str]] = []
        self.missed: list[str] = []  # that no rehearsal met: the starting thread compiled them itself

    def heard(self, *, src: Any, times: Any, cache_hit: bool, **_: object) -> None:
        stages = {"front": times.ir_initialization, **dict(times.lowering_stages), "store": times.store_results}
        self.found += cache_hit
        self.seconds.update({stage: us / 1e6 for stage, us in stages.items()})
        self.each.append((sum(stages.values()) / 1e6, src.name))
        if threading.current_thread() is threading.main_thread():
            self.missed.append(src.name)

    def __str__(self) -> str:
        if not self.each:
            return "no kernels"
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        longest = ", ".join(f"{name} {seconds:.1f}" for seconds, name in sorted(self.each, reverse=True)[:5])
        missed = f", {len(self.missed)} one after the other ({' '.join(self.missed)})" if self.missed else ""
        counts = f"{len(self.each)} kernels, {self.found} of them found{missed}"
        return f"{counts}; seconds of all threads: {stages}; longest: {longest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--born", type=float, required=True, help="seconds since the epoch")
    args = parser.parse_args()
    clock, kernels = Clock(args.born), Kernels()
    clock.over("python")
    import torch

    clock.over("torch")
    import transformers
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401 (each reads what all models are called)

    clock.over("transformers")
    from aiolora import LLM, SamplingParams  # noqa: F401
    from benchmarks.session import Session
    from benchmarks.shapes import make_model

    clock.over("aiolora")
    modules = len(sys.modules)
    if torch.cuda.is_available():
        from triton import knobs

        knobs.compilation.listener = kernels.heard
    clock.over("triton")
    imports = time.time() - args.born
    logging.basicConfig(format="# %(relativeCreated)6.0f ms %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("aiolora").setLevel(logging.INFO)
    lora = {"enable_lora": True, "max_loras": 32, "max_lora_rank": 16}
    session = Session(str(make_model(args.root, args.model)), args.model, dtype=args.dtype, **lora)
    clock.over("engine")
    params = SamplingParams(temperature=0, max_tokens=1)
    session.llm.generate(session.prompts(1, 128), params, use_tqdm=False)
    clock.over("first token")
    said = {
        "imports": imports,
        "engine": session.start_s,
        "token": time.time() - args.born,
        "clock": clock.took,
        "phases": session.llm.engine._built.phases.took,
        "kernels": str(kernels),
        "modules": [modules, len(sys.modules)],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
