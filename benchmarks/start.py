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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.workloads import Row


def start_rows(root: Path, model: str, dtype: str) -> list[Row]:
    """Start of the engine and time to the first token, cold and warm; what they are made of is printed."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        for state in ("no compiled kernels", "kernels compiled before"):
            command = [sys.executable, "-m", "benchmarks.started", "--model", model, "--dtype", dtype]
            command += ["--root", str(root), "--born", str(time.time())]
            done = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, check=True)
            took = json.loads(done.stdout.splitlines()[-1])
            print(breakdown(state, took), flush=True)
            rows.append(Row(f"start of the engine, {state}", took["engine"], "s", "30", "10", "118"))
            rows.append(Row(f"process start to first token (imports {took['imports']:.1f} s)", took["token"], "s"))
    return rows


def breakdown(state: str, took: Mapping[str, Any]) -> str:
    """What a start told, for people: each phase holds up the next, but what is compiled goes on beside."""
    before, after = took["modules"]
    return "\n".join(
        (
            f"# {state}: {_parts(took['clock'])} ({took['versions']})",
            f"#   engine {took['engine']:.1f} s: {_parts(took['phases'])}",
            f"#   modules: {before} imported, {after} in the end",
            f"#   {took['kernels']}",
        )
    )


def _parts(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "aiolora-bench")
    args = parser.parse_args()
    for row in start_rows(args.root, args.model, args.dtype):
        print(f"{row.name:58} {row.value:10.4g} {row.unit}")


if __name__ == "__main__":
    main()
