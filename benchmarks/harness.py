"""What every benchmark shares: the machine in one line, repeated timing, memory bandwidth, CSV."""

import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Result:
    """One measured number."""

    name: str
    value: float
    unit: str
    note: str = ""


def machine() -> str:
    """CPU or GPU, threads, versions: what a figure has to be read with."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{model}, {torch.get_num_threads()} threads{gpu}, {versions}"


def seconds(call: Callable[[], object], *, repeat: int = 3, warm: int = 1) -> list[float]:
    """Wall times of `repeat` calls after `warm` untimed ones."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def median(call: Callable[[], object], *, repeat: int = 3, warm: int = 1) -> float:
    return statistics.median(seconds(call, repeat=repeat, warm=warm))


def medians(calls: Mapping[str, Callable[[], object]], *, repeat: int = 5) -> dict[str, float]:
    """Median wall time of each call, taken in turns so that a drift of the machine meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeat + 1):
        for name, call in calls.items():
            took = seconds(call, repeat=1, warm=0)
            if round_ > 0:
                times[name] += took
    return {name: statistics.median(values) for name, values in times.items()}


def read_bandwidth() -> float:
    """Bytes a second that all threads together can read from memory (a sum over 1 GiB)."""
    data = torch.ones(1 << 28, dtype=torch.float32)
    return data.nbytes / min(seconds(data.sum, repeat=5))


def write(results: Sequence[Result], file: Path) -> None:
    """Print a table and write the CSV; its first line says the machine."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        stream.write(f"# {machine()}\n")
        rows = csv.writer(stream)
        rows.writerow(["name", "value", "unit", "note"])
        rows.writerows([result.name, f"{result.value:.4g}", result.unit, result.note] for result in results)
    print(machine())
    for result in results:
        print(f"{result.name:58} {result.value:10.4g} {result.unit:10} {result.note}")
    print(f"-> {file}")
