"""The benchmark of a decoding model runs, at a toy's size, and every forward that it times has its rows."""

from __future__ import annotations

import torch

from benchmarks.decode_overlap import BARE, TOY, measure
from benchmarks.report import Report
from model_client import MemoryClient


def test_a_toy_decodes_with_and_without_a_memory() -> None:
    report = Report("unwritten")
    with MemoryClient(timeout_s=60.0) as client:
        measure(TOY, torch.device("cpu"), {"here": client}, report)
        assert client.list_memories() == []
    values = {(row.case, row.figure): row.value for row in report.rows}
    cases = {case for case, _ in values}
    assert len(cases) == 2
    for case in cases:
        assert values[case, "forwards with their rows, here"] == 1.0
        ratio = values[case, f"step, {BARE}"] / values[case, "step, here"]
        assert abs(values[case, f"tokens/s / {BARE}, here"] - ratio) <= 0.01 * ratio
