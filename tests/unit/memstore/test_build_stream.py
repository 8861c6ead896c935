"""BuildStream: one stream for all builds of a device, and none on the host; and what is done before the first build."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
import torch

from memstore import index
from memstore.index import build_stream
from memstore.index.build_stream import BuildStream
from memstore.types import MemorySpec

if TYPE_CHECKING:
    from collections.abc import Iterator

GPU = torch.device("cuda", 0)


def test_builds_work_on_one_stream_of_low_priority_and_wait_for_that_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made, current = Mock(side_effect=lambda *_, **__: Mock()), []

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", made)
    monkeypatch.setattr(torch.cuda, "stream", on)
    build_stream._stream.cache_clear()
    stream, seen = BuildStream(GPU), []
    stream.wait()  # before anything was begun
    for _ in range(2):
        with pytest.raises(InterruptedError), stream.at_work():
            assert not torch.is_grad_enabled()
            seen += current
            stream.wait()
            raise InterruptedError  # as a build is stopped
        assert not current
    made.assert_called_once_with(GPU, priority=0)
    assert seen[0] is seen[1]
    assert seen[0].synchronize.call_count == 2
    assert torch.is_grad_enabled()
    with BuildStream(GPU).at_work():  # of another memory
        seen += current
    build_stream._stream.cache_clear()
    made.assert_called_once_with(GPU, priority=0)
    assert seen[2] is seen[0]


def test_on_the_host_there_is_none() -> None:
    stream = BuildStream(torch.device("cpu"))
    with stream.at_work():
        assert not torch.is_grad_enabled()
        stream.wait()
    assert torch.is_grad_enabled()


def test_what_cannot_be_made_ready_is_said_and_harms_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on = Mock(side_effect=nullcontext)
    monkeypatch.setattr(torch.cuda, "device", on)
    fails, works = Mock(side_effect=RuntimeError("no such kernel")), Mock()
    with ThreadPoolExecutor(1) as executor:
        index._rehearse(executor, MemorySpec(name="m", dim=4, capacity=8), GPU, fails, works)
    works.assert_called_once_with()
    assert "could not be made ready" in caplog.text
    on.assert_called_with(GPU)
