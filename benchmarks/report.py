"""A benchmark's report: its rows, the machine and the revision, written as benchmarks/results/NAME.json."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PAUSE_S = 0.03

RESULTS = Path(__file__).parent / "results"
CODE = ("--", ":/", ":(top,exclude)benchmarks/results")
"""For git: what is written while it is measured is no change."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one case. goal: None where it is only recorded; better: "lower" or "higher"."""

    case: str
    figure: str
    value: float
    unit: str
    goal: float | None
    better: str

    @property
    def is_missed(self) -> bool:
        """Whether there is a goal, and the value does not reach it."""
        if self.goal is None:
            return False
        return self.value > self.goal if self.better == "lower" else self.value < self.goal


@dataclass(slots=True)
class Report:
    """Collects rows, shows each as it comes, and writes them. name: of the file in benchmarks/results."""

    name: str
    rows: list[Row] = field(default_factory=list)

    def add(
        self, case: str, figure: str, value: float, unit: str, *, goal: float | None = None, better: str = "lower"
    ) -> None:
        """Adds one row."""
        row = Row(case, figure, float(f"{value:.4g}"), unit, goal, better)
        self.rows.append(row)
        print(show(row), flush=True)

    def write(self) -> Path:
        """Writes all rows; gives the file."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        content = {
            "commit": revision(),
            "machine": machine(),
            "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "rows": [asdict(row) for row in self.rows],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def show(row: Row) -> str:
    """One line for the terminal."""
    goal = "" if row.goal is None else f"   {'MISSES' if row.is_missed else 'reaches'} its goal of {row.goal:g}"
    return f"{row.case:<44} {row.figure:<34} {row.value:>10.4g} {row.unit}{goal}"


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, all called in turn once a round; see in_rounds."""
    return {name: statistics.median(seconds) for name, seconds in in_rounds(functions, rounds).items()}


def in_rounds(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round: all called in turn, so that a busy machine disturbs them alike.

    Before each there is a pause, in which the threads of the one before stop spinning and leave it the cores.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(PAUSE_S)
            begun = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def revision() -> str:
    """The commit that is measured, with "+" where the tree has changes but results; "unknown" outside of a checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    """Processor, cores, memory, accelerator; versions of what does the work."""
    parts = [_processor(), f"{os.cpu_count()} cores", f"{_memory_bytes() / 2**30:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    try:
        import faiss

        parts.append(f"FAISS {faiss.__version__}")
    except ImportError:
        parts.append("no FAISS")
    return ", ".join(parts)


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
