"""docs/speed.svg, drawn from the tables of docs/performance.md: how many times as fast as who else.

    python -m benchmarks.picture

Needs the extra `aiolora[plots]`. `tests/test_docs.py` holds the picture against the page.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = DOCS / "speed.svg"
_LOADS = {
    "W1": "512 prompts of 512 tokens",
    "W2": "512 prompts of 512 tokens",
    "W3": "256 answers of 256 tokens",
    "W4": "1 stream",
    "W5": "32 streams",
}


class Bar(NamedTuple):
    """One comparison."""

    label: str
    times: float  # as fast as the other
    plain: bool  # the base model alone


def on_cpu() -> Iterator[Bar]:
    """Against transformers + PEFT: the page gives the ratio."""
    for workload, *_, ratio, _ in _rows("## CPU: against"):
        if ratio.endswith(" x"):
            label = re.sub(r" *\(.*?\)", "", workload).replace("`", "")
            yield Bar(label, float(ratio.removesuffix(" x")), "base" in label)


def on_gpu() -> Iterator[Bar]:
    """Against vLLM: of times a step, and of tokens a second."""
    for workload, ours, _, theirs in _rows("### Figures so far"):
        load, _, variants = workload.partition(" ")[0].rstrip(",:"), None, workload.rpartition(": ")[2]
        if load not in _LOADS:
            continue
        names = [name.split()[-1] if name.startswith("W") else name for name in variants.split("; ")]
        for name, own, other in zip(names, _numbers(ours), _numbers(theirs), strict=True):
            times = other / own if ours.endswith(" ms") else own / other
            yield Bar(f"{_LOADS[load]}: {name}", times, name == "base")


def _rows(heading: str) -> Iterator[list[str]]:
    """Cells of the first table below a heading, without its two head lines."""
    below = (DOCS / "performance.md").read_text().split(heading)[1]
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table is not None, heading
    for line in table[0].splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def _numbers(cell: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]*\d(?:\.\d+)?", cell.removesuffix("/s"))]


def draw() -> None:
    """Text stays text, so that the picture is small and can be read; grey is seen on white and on black."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    grey = "#888888"
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "aiolora", "text.color": grey, "axes.edgecolor": grey}
        | {f"{axis}tick.color": grey for axis in "xy"}
    )
    groups = {
        "one H200, Llama-3.1-8B's shape: vLLM 0.25.1 is 1": list(on_gpu()),
        "two CPU cores, SmolLM2-135M: transformers + PEFT is 1": list(on_cpu()),
    }
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    panels = figure.subplots(2, 1, height_ratios=[len(bars) for bars in groups.values()])
    for panel, (title, bars) in zip(panels, groups.items(), strict=True):
        colors = ["#9aa5ce" if bar.plain else "#3f51b5" for bar in bars]
        drawn = panel.barh([bar.label for bar in bars], [bar.times for bar in bars], color=colors, height=0.7)
        panel.bar_label(drawn, labels=[words(bar) for bar in bars], padding=4)
        panel.axvline(1, color=grey, linewidth=1)
        panel.invert_yaxis()
        panel.set_title(title, loc="left", fontsize="medium")
        panel.set(xlim=(0, 1.15 * max(bar.times for bar in bars)), xticks=[])
        panel.tick_params(left=False)
        panel.spines[:].set_visible(False)
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None, "Creator": None})


def words(bar: Bar) -> str:
    """What stands behind it."""
    return f"{bar.times:.1f} x"


if __name__ == "__main__":
    draw()
