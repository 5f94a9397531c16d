"""How long an engine takes to start, in processes of their own: with empty caches of compiled kernels, and again.

python -m benchmarks.start --model llama-3.1-8b
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.workloads import Row


def start_rows(root: Path, model: str, dtype: str) -> list[Row]:
    """Start of the engine and time to the first token, cold and warm."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        for state in ("no compiled kernels", "kernels compiled before"):
            command = [sys.executable, "-m", "benchmarks.start", "--child", "--model", model, "--dtype", dtype]
            command += ["--root", str(root), "--born", str(time.time())]
            done = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, check=True)
            took = json.loads(done.stdout.splitlines()[-1])
            rows.append(Row(f"start of the engine, {state}", took["engine"], "s", "30", "10", "118"))
            rows.append(Row(f"process start to first token (imports {took['imports']:.1f} s)", took["token"], "s"))
    return rows


def _child(args: argparse.Namespace) -> None:
    from aiolora import LLM, SamplingParams
    from benchmarks.session import Session
    from benchmarks.shapes import make_model

    assert LLM is not None
    imports = time.time() - args.born
    lora = {"enable_lora": True, "max_loras": 32, "max_lora_rank": 16}
    session = Session(str(make_model(args.root, args.model)), args.model, dtype=args.dtype, **lora)
    params = SamplingParams(temperature=0, max_tokens=1)
    session.llm.generate(session.prompts(1, 128), params, use_tqdm=False)
    print(json.dumps({"imports": imports, "engine": session.start_s, "token": time.time() - args.born}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "aiolora-bench")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--born", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(args)
        return
    for row in start_rows(args.root, args.model, args.dtype):
        print(f"{row.name:58} {row.value:10.4g} {row.unit}")


if __name__ == "__main__":
    main()
