"""Pictures of a benchmark. Needs the extra `aiolora[plots]`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from aiolora.cli.bench.workload import Outcome

_MOST = 8  # models with a line of their own


def draw(path: Path, outcomes: Sequence[Outcome], title: str) -> None:
    """Four panels as one PNG: first tokens and gaps as shares, by model; tokens and requests under way over time."""
    matplotlib.use("Agg")
    good = [outcome for outcome in outcomes if outcome.error is None]
    start_s = min(outcome.sent_s for outcome in good)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (first, between), (pace, load) = figure.subplots(2, 2)
    figure.suptitle(title)
    models = sorted({outcome.model for outcome in good})
    for model in models if len(models) <= _MOST else ["all"]:
        mine = [outcome for outcome in good if model in (outcome.model, "all")]
        first.ecdf([1e3 * outcome.first_s for outcome in mine], label=model)
        gaps = [1e3 * gap for outcome in mine for gap in outcome.between_s]
        if gaps:
            between.ecdf(gaps, label=model)
    for panel, words in ((first, "time to first token, ms"), (between, "between tokens, ms")):
        panel.set(xlabel=words, ylabel="share", ylim=(0, 1))
        panel.legend(loc="lower right", fontsize="small")
    times = sorted(time - start_s for outcome in good for time in outcome.token_s)
    width = max(times[-1] / 50, 1e-3)
    edges = [width * number for number in range(int(times[-1] / width) + 2)]
    pace.hist(times, bins=edges, weights=[1 / width] * len(times), histtype="stepfilled", alpha=0.6)
    pace.set(xlabel="seconds", ylabel="output tokens a second")
    changes = sorted(
        [(outcome.sent_s - start_s, 1) for outcome in good] + [(outcome.token_s[-1] - start_s, -1) for outcome in good]
    )
    under_way, running = [], 0
    for _, change in changes:
        running += change
        under_way.append(running)
    load.step([time for time, _ in changes], under_way, where="post")
    load.set(xlabel="seconds", ylabel="requests under way")
    for panel in (first, between, pace, load):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
