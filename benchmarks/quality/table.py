"""Table: readings of variants against a baseline, with intervals over documents, written as one result."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import report as reports
from benchmarks.quality import data
from benchmarks.quality.reading import Reading, Variant
from integration.demo.command import WEIGHTS
from model_client import MemoryClient

if TYPE_CHECKING:
    import argparse

K = 1024
LENGTH = 128 * K
"""Tokens of each document, where nothing else is asked for."""

BASE = WEIGHTS / "base"
SHIPPED = {"ours": WEIGHTS / "adapter", "lora": Path(__file__).parent / "weights" / "lora"}
"""Trained variants of the tables that are in the repository: ours is the demo's."""

T_975 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
    15: 2.145,
    20: 2.093,
}


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95% t interval of the mean of (n,) differences."""
    n = len(differences)
    if n < 2:
        return (float("nan"), float("nan"))
    t = T_975.get(n, 2.0)
    half = t * float(differences.std(ddof=1)) / math.sqrt(n)
    return float(differences.mean()) - half, float(differences.mean()) + half


def percent(nats: float) -> float:
    """A difference of mean losses as per cent of perplexity."""
    return 100.0 * (math.exp(nats) - 1.0)


class Table:
    """One table: readings against a baseline reading, written with every document's loss."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.report = reports.Report(f"quality-{name}" + (f"@{options.part}" if options.part else ""))
        self.documents: dict[str, Any] = {}
        self.curves: dict[str, Any] = {}
        self.client = MemoryClient(":memory:", device="cuda" if torch.cuda.is_available() else "cpu", timeout_s=120.0)
        self._variants: dict[str, Variant] = {}
        self._windows: dict[tuple[str, str, int], data.Windows] = {}

    def variant(self, name: str) -> Variant:
        """A trained variant by name, "base" for what it began as, loaded once; KeyError where its folder is missing."""
        if name == "base":
            return Variant.load(self.options.base, None)
        if name not in self._variants:
            folder = SHIPPED[name] if self.options.runs is None else self.options.runs / name
            until = time.monotonic() + self.options.wait
            while not (folder / "report.json").exists() and time.monotonic() < until:
                time.sleep(0.2)
            if not (folder / "report.json").exists():
                raise KeyError(name)
            self._variants = {name: Variant.load(self.options.base, folder)}
        return self._variants[name]

    @property
    def runs(self) -> Path:
        """The folder of trainings. Raises ValueError where none was given."""
        if self.options.runs is None:
            raise ValueError(f"{self.name}: --runs is needed")
        folder: Path = self.options.runs
        return folder

    def warm(self) -> None:
        """Compiles what the first step would wait for."""
        session = self.client.create_memory("warm", dim=8, capacity=64, exist_ok=True) and self.client.session(
            "warm", ["a"]
        )
        session.append(torch.zeros(64, 8, device="cuda" if torch.cuda.is_available() else "cpu"), [64])
        self.client.drop_memory("warm")

    def windows(self, domain: str, split: str = "test", length: int = 0) -> data.Windows:
        """The documents of a domain, `length` tokens each."""
        key = (domain, split, length or self.options.length)
        if key not in self._windows:
            self._windows[key] = data.windows(self.options.data, domain, split, key[2])
        return self._windows[key]

    def add(
        self,
        case: str,
        reading: Reading,
        windows: data.Windows,
        baseline: Reading | None = None,
        goal: float | None = None,
    ) -> None:
        """Rows of one reading: perplexity, bits a byte, and its change against the baseline with the interval."""
        nats = reading.per_document
        self.documents[case] = dict(zip(windows.names, [round(float(each), 5) for each in nats], strict=True))
        self.report.add(case, "perplexity", math.exp(nats.mean()), "per token")
        bits = reading.losses.sum(axis=1, dtype=np.float64) / math.log(2) / windows.num_bytes
        self.report.add(case, "bits a byte", float(bits.mean()), "bits")
        if baseline is not None:
            differences = nats - baseline.per_document
            low, high = interval(differences)
            self.report.add(case, "perplexity against baseline", percent(float(differences.mean())), "%", goal=goal)
            self.report.add(case, "the same, low end", percent(low), "%")
            self.report.add(case, "the same, high end", percent(high), "%")

    def write(self) -> None:
        """The JSON of the report, with the documents' losses and the commit of an exported tree beside the rows."""
        path = self.report.write()
        content = json.loads(path.read_text())
        shorter = "" if self.options.length == LENGTH else f" --length {self.options.length}"
        content["command"] = f"python -m benchmarks.quality.tables {self.name}{shorter}"
        commit = Path("COMMIT")
        if content["commit"] == "unknown" and commit.exists():
            content["commit"] = commit.read_text().strip()
        content["nats_of_each_document"] = self.documents
        if self.curves:
            content["curves"] = self.curves
        path.write_text(json.dumps(content, indent=1) + "\n")


def join(name: str) -> None:
    """Makes quality-NAME.json of quality-NAME@*.json."""
    parts = sorted(reports.RESULTS.glob(f"quality-{name}@*.json"))
    contents = [json.loads(part.read_text()) for part in parts]
    rows = {(row["case"], row["figure"]): row for content in contents for row in content["rows"]}
    joined = contents[0] | {"rows": list(rows.values()), "nats_of_each_document": {}}
    for content in contents:
        for key in ("nats_of_each_document", "curves"):
            if key in content:
                joined[key] = joined.get(key, {}) | content[key]
    (reports.RESULTS / f"quality-{name}.json").write_text(json.dumps(joined, indent=1) + "\n")
    for part in parts:
        part.unlink()
