"""GuideLLM, a load generator: a run of it over prompts from a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_it_measures_a_run_without_an_error(url: str, tmp_path: Path) -> None:
    pytest.importorskip("guidellm", exc_type=ImportError)
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me of {number}."}) + "\n" for number in range(8)))
    said = {
        "--backend": f"kind=openai_http,target={url.removesuffix('/v1')},model=sql,max_tokens=8",
        "--profile": "kind=concurrent,streams=2",
        "--constraint": "kind=max_requests,count=6",
        "--data": f"kind=json_file,path={prompts}",
        "--output": f"kind=json,path={report}",
    }
    options = [part for option in said.items() for part in option]
    subprocess.run(
        [sys.executable, "-m", "guidellm", "run", "--disable-console", *options],
        check=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    [run] = json.loads(report.read_text())["benchmarks"]
    totals = run["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["total"]) == (6, 0, 6)
    assert run["metrics"]["time_to_first_token_ms"]["successful"]["mean"] > 0
    assert run["metrics"]["output_token_count"]["successful"]["max"] <= 8
