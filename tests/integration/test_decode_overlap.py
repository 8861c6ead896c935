"""The benchmark of a decoding model runs, at a toy's size, and every forward that it times has its rows."""

from __future__ import annotations

import torch

from benchmarks.decode_overlap import BARE, TOY, Decoding, measure
from benchmarks.report import Report
from model_client import MemoryClient


def test_a_toy_decodes_with_and_without_a_memory() -> None:
    report = Report("unwritten")
    with MemoryClient(timeout_s=60.0) as client:
        measure(Decoding(TOY, torch.device("cpu")), {"here": client}, report)
        assert client.list_memories() == []
    values = {(row.case, row.figure): row.value for row in report.rows}
    cases = {case for case, _ in values}
    assert len(cases) == 2
    for case in cases:
        assert values[case, "forwards with their rows, here"] == 1.0
        assert 0 < values[case, f"tokens/s / {BARE}, here"]
        assert min(values[case, f"step, {BARE}, beside here"], values[case, "step, here"]) > 0
