"""The capture of CUDA graphs, by a graph that only notes what is done with it: no garbage is collected meanwhile."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
import torch

from memstore.gpu import capturing as module
from memstore.gpu.capturing import capturing

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_stream", lambda _: Mock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    yield
    gc.enable()


@pytest.mark.parametrize("failing", ["capture_begin", "work", "capture_end"])
def test_garbage_is_collected_after_a_capture_that_fails(failing: str) -> None:
    error = torch.AcceleratorError("spoilt")
    graph = Mock(**{f"{failing}.side_effect": error})
    with pytest.raises(torch.AcceleratorError), capturing(graph, DEVICE):
        assert not gc.isenabled()
        if failing == "work":
            raise error
    assert gc.isenabled()
