"""The transport within one process: nothing handed over is left behind, and a child has no part in it."""

from __future__ import annotations

import gc
import os
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest
import torch

from model_client import MemoryClient, Retrieval, errors
from model_client.transport.process import ProcessTransport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

    from memstore.plane import ProcessPlane


@pytest.fixture
def transport() -> Iterator[ProcessTransport]:
    made = ProcessTransport("cpu")
    yield made
    made.close()


@pytest.fixture
def client(transport: ProcessTransport) -> MemoryClient:
    client = MemoryClient(transport=transport, timeout_s=20.0)
    client.create_memory("m", dim=4, capacity=8, max_sequences=2, payloads={"token": (torch.int64, (1,))})
    return client


@pytest.fixture
def handed(transport: ProcessTransport) -> ProcessPlane:
    """What was handed over and not yet taken."""
    return transport._embedded.plane


TOKENS = {"token": torch.ones(2, 1, dtype=torch.int64)}


def test_results_are_taken(client: MemoryClient, handed: ProcessPlane) -> None:
    session = client.session("m", ["a"])
    for _ in range(3):
        session.step(torch.ones(2, 4), [2], retrieve=Retrieval(2), append=True, payloads=TOKENS)
    assert len(handed) == 0


def test_what_is_refused_is_let_go_of(client: MemoryClient, handed: ProcessPlane) -> None:
    session = client.session("m", ["a"])
    with pytest.raises(errors.InvalidRequest):
        session.append(torch.full((2, 4), float("nan")), [2], payloads=TOKENS)
    with pytest.raises(errors.InvalidRequest):
        session.append(torch.ones(2, 4), [2])
    with pytest.raises(errors.NotFound):
        client.session("nothing", ["a"]).append(torch.ones(2, 4), [2], payloads=TOKENS)
    assert len(handed) == 0


def test_what_nobody_waits_for_is_let_go_of(client: MemoryClient, handed: ProcessPlane) -> None:
    session = client.session("m", ["a"])
    session.append(torch.ones(2, 4), [2], payloads=TOKENS)
    with pytest.raises((errors.Late, errors.Expired)):
        session.retrieve(torch.ones(2, 4), [2], Retrieval(2), deadline_s=0.0)
    session.start_step(torch.ones(2, 4), [2], retrieve=Retrieval(2), append=True, payloads=TOKENS)
    session.start_step(torch.ones(2, 4), [2], retrieve=Retrieval(2), append=False)
    gc.collect()
    session.append(torch.ones(2, 4), [2], payloads=TOKENS)  # the device answers in order: the others are answered
    assert len(handed) == 0


def test_a_start_whose_question_is_refused_for_now_asks_again(
    client: MemoryClient, transport: ProcessTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a refused call handed over is gone."""
    call, refusals = transport.call, [errors.NotReady("not now")]

    def not_yet(method: str, request: Message, timeout_s: float) -> Future[Message]:
        if not refusals:
            return call(method, request, timeout_s)
        transport.plane.discard(request)
        answer: Future[Message] = Future()
        answer.set_exception(refusals.pop())
        return answer

    monkeypatch.setattr(transport, "call", not_yet)
    session = client.session("m", ["a"])
    assert session.append(torch.ones(2, 4), [2], payloads=TOKENS, start_of_sequence=True).sequences[0].num_appended == 2


def test_a_child_process_is_told_that_the_engine_is_not_there(
    client: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        with pytest.raises(errors.ClientClosed):
            client.info()
        client.close()
    assert client.info().device == "cpu", "closing in the child leaves the parent's engine alone"


def test_counts_that_change_in_place_are_seen(client: MemoryClient) -> None:
    session = client.session("m", ["a", "b"])
    counts, starts = [1, 2], [False, False]
    for _ in range(2):
        session.append(torch.ones(3, 4), counts, payloads={"token": torch.ones(3, 1, dtype=torch.int64)})
    counts[:] = 3, 0
    starts[1] = True
    step = session.append(
        torch.ones(3, 4), counts, start_of_sequence=starts, payloads={"token": torch.ones(3, 1, dtype=torch.int64)}
    )
    assert [(each.first_position, each.num_appended) for each in step.sequences] == [(2, 3), (0, 0)]
