"""What is compiled for a GPU before a server serves: as much as the time allows; it serves in any case."""

from __future__ import annotations

import logging

import pytest
import torch

from memstore.errors import DeviceMemoryFull
from memstore.index import exact
from memstore.logs import TextFormatter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda")


def test_common_memories_are_retrieved_from_until_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from memstore.gpu import warming

    done: list[int] = []
    monkeypatch.setattr(warming, "_retrieve", lambda slab, retriever, count: done.append(slab.dim))
    seconds = iter([0.0, 0.0, 1.0, warming.MOST_S + 1, warming.MOST_S + 1, warming.MOST_S + 1])
    with caplog.at_level(logging.INFO):
        warming.warm(DEVICE, lambda: next(seconds))
    assert done == [256, 256]
    (line,) = caplog.records
    assert TextFormatter().format(line).endswith("search compiled for common memories kinds=2 of 10 seconds=11.0")


def test_all_of_them_can_be_retrieved_from() -> None:
    from memstore.gpu import warming

    warming.warm(DEVICE, lambda: 0.0)


def test_a_full_device_is_no_reason_not_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from memstore.gpu import warming

    def full(*_: object) -> None:
        raise DeviceMemoryFull("no room")

    monkeypatch.setattr(warming, "_retrieve", full)
    exact.prepare(DEVICE)
