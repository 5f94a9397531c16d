"""What a benchmark found: a table of percentiles, a line a request as CSV, pictures."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aiolora.cli.bench.workload import Outcome

_PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest, linearly; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(outcomes: Sequence[Outcome], seconds: float, prompt_tokens: int) -> dict[str, float]:
    """Every figure by its name; times in milliseconds. `prompt_tokens`: of one prompt."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    figures: dict[str, float] = {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "models": len({outcome.model for outcome in good}),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": sum(len(outcome.token_s) for outcome in good) / seconds,
        "total_tokens_per_s": sum(len(outcome.token_s) + prompt_tokens for outcome in good) / seconds,
    }
    between = [value for outcome in good for value in outcome.between_s]
    times = {
        "ttft": [outcome.first_s for outcome in good],
        "itl": between,
        "e2e": [outcome.whole_s for outcome in good],
    }
    for name, values in times.items():
        figures[f"{name}_mean_ms"] = 1e3 * sum(values) / max(1, len(values))
        for percent in _PERCENTILES:
            figures[f"{name}_p{percent}_ms"] = 1e3 * percentile(values, percent)
    return figures


def show(figures: dict[str, float], outcomes: Sequence[Outcome], console: Console) -> None:
    """Print it."""
    console.print(
        f"{figures['requests']:.0f} requests over {figures['models']:.0f} models in {figures['seconds']:.2f} s: "
        f"{figures['requests_per_s']:.2f} requests/s, {figures['output_tokens_per_s']:.1f} output tokens/s, "
        f"{figures['total_tokens_per_s']:.1f} tokens/s with prompts"
    )
    table = Table("ms", "mean", *(f"p{percent}" for percent in _PERCENTILES))
    for name, words in (("ttft", "time to first token"), ("itl", "between tokens"), ("e2e", "whole answer")):
        columns = ("mean", *(f"p{percent}" for percent in _PERCENTILES))
        table.add_row(words, *(f"{figures[f'{name}_{column}_ms']:.1f}" for column in columns))
    console.print(table)
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    for error in dict.fromkeys(errors):
        console.print(f"failed {errors.count(error)} times: {error}", markup=False)


def write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A line a request, times in milliseconds, `sent_ms` since the first."""
    start_s = min((outcome.sent_s for outcome in outcomes), default=0.0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "sent_ms", "ttft_ms", "itl_p50_ms", "itl_p99_ms", "e2e_ms", "tokens", "error"])
        for one in outcomes:
            good = one.error is None
            times = (
                (one.first_s, percentile(one.between_s, 50), percentile(one.between_s, 99), one.whole_s) if good else ()
            )
            first, middle, worst, whole = [f"{1e3 * value:.3f}" for value in times] or [""] * 4
            sent = f"{1e3 * (one.sent_s - start_s):.3f}"
            writer.writerow([one.model, sent, first, middle, worst, whole, len(one.token_s), one.error or ""])
