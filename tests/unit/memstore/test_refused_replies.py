"""Steps whose reply cannot be given: nothing of them is done, whoever asks and however it is found out."""

from __future__ import annotations

import itertools

import pytest
import torch

from memstore.errors import DeviceMemoryFull, QuotaExceeded
from memstore.memory import Memory
from memstore.types import Hits, MemorySpec, RetrieveOptions, SequencePart, StepBatch, StepResult
from memstore.v1 import memstore_pb2 as pb
from model_client import MemoryClient, Retrieval, errors
from tests.calling import fails
from tests.serving import Serving, step

SPEC = MemorySpec(name="m", dim=4, capacity=8, max_sequences=4, num_layers=2, dtype=torch.float32)


def _batch(name: str, value: float, rows: int = 2, seq: int = 0) -> StepBatch:
    return StepBatch(
        parts=(SequencePart(sequence=name, num_rows=rows, seq=seq),),
        layers=(0, 1),
        keys=torch.full((2, rows, 4), value),
        retrieve=RetrieveOptions(top_k=8),
        append=True,
        writer="w",
    )


def _rows(memory: Memory, name: str) -> list[float]:
    """The first element of every live row of layer 1, by position."""
    found = memory.step([StepBatch(
        parts=(SequencePart(sequence=name, num_rows=1),),
        layers=(1,),
        keys=torch.zeros(1, 1, 4),
        retrieve=RetrieveOptions(top_k=8),
    )])[0]  # fmt: skip
    assert isinstance(found, StepResult)
    assert found.hits is not None
    return found.hits.arrays["key"][:, 0].tolist()


@pytest.fixture
def memory(device: torch.device) -> Memory:
    return Memory(SPEC, device, new_epoch=itertools.count(1).__next__)


def test_a_batch_whose_hits_are_not_taken_is_undone_and_the_others_are_done(memory: Memory) -> None:
    memory.step([_batch("old", 1.0)])
    taken: list[int] = []

    def carry(at: int, hits: Hits) -> None:
        assert hits.positions.device.type == memory.device.type
        taken.append(at)
        if at in (0, 2):
            raise QuotaExceeded("too large")

    batches = [_batch("x", 2.0), _batch("y", 3.0), _batch("old", 4.0, seq=1), _batch("z", 5.0, rows=11)]
    results = memory.step(batches, carry)
    assert taken == [0, 1, 2, 3]
    assert [isinstance(result, QuotaExceeded) for result in results] == [True, False, True, False]
    assert [_rows(memory, name) for name in ("old", "x", "y", "z")] == [[1.0] * 2, [], [3.0] * 2, [5.0] * 8]
    assert (memory.counts().num_sequences, memory.counts().appended_rows) == (3, 2 * (2 + 2 + 11))
    assert all(isinstance(result, StepResult) for result in memory.step(batches[::2]))
    assert [_rows(memory, name) for name in ("old", "x")] == [[1.0] * 2 + [4.0] * 2, [2.0] * 2]


def test_no_room_to_stage_changes_nothing(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("memstore.slab.Slab.in_all_layers", full)
    with pytest.raises(DeviceMemoryFull, match="nothing was changed"):
        memory.step([_batch("a", 1.0)])
    assert memory.counts().appended_rows == 0


def test_a_reply_beyond_a_message_leaves_its_append_undone(server: Serving) -> None:
    server.stub.Step(step(rows=3))
    server.front.max_reply_bytes = 50
    error = fails(server, "Step", step(rows=1, seq=1))
    assert isinstance(error, QuotaExceeded)
    assert int(error.metadata["reply_bytes"]) > 50
    status = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="notes")).memory.status
    assert status.num_rows == 3
    assert server.stub.Step(step(rows=2, seq=1, retrieve=None)).sequences[0].first_position == 3


def test_a_session_goes_on_after_a_reply_that_was_too_large(server: Serving) -> None:
    front = server.front
    most = front.max_reply_bytes
    with MemoryClient(server.target) as client:
        session = client.session("notes", ["a"])
        session.append(torch.full((3, 4), 1.0), [3])
        front.max_reply_bytes = 100
        with pytest.raises(errors.QuotaExceeded):
            session.step(torch.full((1, 4), 2.0), [1], retrieve=Retrieval(top_k=3, after=2), append=True)
        front.max_reply_bytes = most
        session.append(torch.full((1, 4), 3.0), [1])
        found = session.retrieve(torch.zeros(1, 4), [1], Retrieval(top_k=8))
    assert found.hits is not None
    assert found.hits.rows["key"][:, 0].tolist() == [1.0, 1.0, 1.0, 3.0]
