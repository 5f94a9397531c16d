"""`aiolora bench`: who is asked for what and when, the figures, and the three commands against real engines."""

import asyncio
import csv
import json
import math
import random
from collections import Counter
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

from aiolora.cli import main
from aiolora.cli.bench.report import percentile, summary
from aiolora.cli.bench.workload import Ask, Outcome, drive, models_asked, workload
from aiolora.errors import RequestError

MODELS = ["a", "b", "c", "d"]


def asked(popularity: str, count: int = 4000) -> Counter[str]:
    return Counter(models_asked(MODELS, count, popularity, random.Random(1)))  # type: ignore[arg-type]


def test_popularity_says_who_is_asked_for() -> None:
    assert asked("identical") == {"a": 4000}
    assert asked("distinct") == dict.fromkeys(MODELS, 1000)
    assert all(abs(count - 1000) < 150 for count in asked("uniform").values())
    zipf = asked("zipf")
    for rank, model in enumerate(MODELS, start=1):
        assert zipf[model] / zipf["a"] == pytest.approx(1 / rank, rel=0.15)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    asks = workload(MODELS, count=4000, popularity="distinct", input_len=1, output_len=1, rate=50)
    gaps = [late.after_s - early.after_s for early, late in pairwise(asks)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.1)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.1)  # as of an exponential distribution


def test_without_a_rate_all_come_at_once_and_a_seed_gives_the_same_requests() -> None:
    def some(seed: int) -> list[Ask]:
        return workload(MODELS, count=9, popularity="zipf", input_len=5, output_len=3, seed=seed)

    assert {ask.after_s for ask in some(1)} == {0}
    assert some(1) == some(1)
    assert some(1) != some(2)


def test_percentiles_lie_between_the_nearest_two() -> None:
    assert [percentile([4, 1, 3, 2], percent) for percent in (0, 50, 75, 100)] == [1, 2.5, 3.25, 4]
    assert percentile([], 50) == 0


def test_figures_come_from_the_times_of_tokens() -> None:
    good = [Outcome("a", 1.0, [1.1, 1.2, 1.4]), Outcome("b", 1.0, [1.3])]
    figures = summary([*good, Outcome("a", 1.0, [], "refused")], 2.0, prompt_tokens=10)
    wanted = {
        "requests": 3,
        "failed": 1,
        "models": 2,
        "requests_per_s": 1.0,
        "output_tokens_per_s": 2.0,
        "total_tokens_per_s": 12.0,
        "ttft_mean_ms": 200,
        "ttft_p50_ms": 200,
        "itl_mean_ms": 150,
        "e2e_p50_ms": 350,
    }
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted)


async def test_a_request_that_fails_is_an_outcome_and_no_more_than_allowed_are_under_way() -> None:
    under_way = most = 0

    async def send(ask: Ask) -> AsyncIterator[int]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        yield 1
        await asyncio.sleep(0)
        under_way -= 1
        if ask.model == "b":
            raise RequestError("refused")
        yield 2

    asks = workload(["a", "b"], count=6, popularity="distinct", input_len=1, output_len=3)
    outcomes = await drive(asks, send, at_once=2)
    assert most == 2
    assert [outcome.error for outcome in outcomes] == [None, "refused"] * 3
    assert [len(outcome.token_s) for outcome in outcomes] == [3, 1] * 3


@pytest.mark.parametrize("what", ["throughput", "latency"])
def test_an_engine_of_its_own_is_measured(
    what: str, byte_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", what, str(byte_model), "--dtype", "float32", "--num-requests", "4", "--input-len", "8"]
    argv += ["--output-len", "5", "--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json")]
    assert main(argv + (["--rounds", "2"] if what == "latency" else [])) == 0
    requests = 8 if what == "latency" else 4
    figures = json.loads((tmp_path / "a.json").read_text())
    assert (figures["requests"], figures["failed"]) == (requests, 0)
    assert figures["output_tokens_per_s"] * figures["seconds"] == pytest.approx(5 * requests)
    with open(tmp_path / "a.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == ["5"] * requests
    assert all(float(row["e2e_ms"]) >= float(row["ttft_ms"]) > 0 for row in rows)
    assert "time to first token" in capsys.readouterr().out


def test_pictures_are_drawn(byte_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    argv = ["bench", "throughput", str(byte_model), "--dtype", "float32", "--num-requests", "3", "--output-len", "4"]
    assert main([*argv, "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    assert "nobody answers" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", "nowhere"]) == 1
    assert "give one such as http://localhost:8000" in capsys.readouterr().err
    assert main(["bench", "serve", "--models", "m", "--rate", "0"]) == 1
    assert "--rate must be over 0" in capsys.readouterr().err
