"""Messages and records with bytes changed at random: refused or taken, never a bug and never a crash."""

from __future__ import annotations

import os
from random import Random
from typing import TYPE_CHECKING

import grpc
import pytest

from memstore.changes import decode, encode
from memstore.errors import Corrupt, Internal
from memstore.grpc_front import SERVICE
from memstore.journal import read_step
from memstore.log import MAGIC
from memstore.v1 import memstore_pb2 as pb
from tests.calling import failure
from tests.fakes import FakeDisk
from tests.lives import FOLDER, Life, batch
from tests.serving import serving, spec, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.serving import Serving

ROUNDS = int(os.environ.get("MUTATIONS", "400"))
REQUESTS = {
    "Step": step(("a", "b"), rows=2),
    "Append": pb.AppendRequest(memory="notes", sequences=step().sequences, writer="w", keys=step().keys),
    "CreateMemory": pb.CreateMemoryRequest(
        spec=spec("n", payloads=[pb.PayloadSpec(name="x", dtype=pb.DATA_TYPE_FP32, shape=[2])])
    ),
    "Fork": pb.ForkRequest(memory="notes", source="a", target="c", as_of=1),
    "Reset": pb.ResetRequest(memory="notes", sequences=["a"], release=True),
    "Pin": pb.PinRequest(memory="notes", sequences=["a"]),
}


def mutated(content: bytes, random: Random) -> bytes:
    """The content with some bytes changed, taken out, put in, or taken from elsewhere in it."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed) + 1)
        match random.randrange(4):
            case 0 if at < len(changed):
                changed[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])
            case 1:
                del changed[at : at + random.randint(1, 8)]
            case 2:
                changed[at:at] = random.randbytes(random.randint(1, 8))
            case _:
                begin = random.randrange(len(changed) + 1)
                changed[at:at] = changed[begin : begin + random.randint(1, 32)]
    return bytes(changed)


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as made:
        made.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
        yield made


@pytest.mark.parametrize("method", REQUESTS)
def test_a_mutated_request_is_taken_or_refused(method: str, server: Serving) -> None:
    call = server.channel.unary_unary(f"/{SERVICE.full_name}/{method}")
    content, random = REQUESTS[method].SerializeToString(), Random(method)
    for _ in range(ROUNDS):
        changed = mutated(content, random)
        try:
            call(changed, timeout=30)
        except grpc.RpcError as error:
            assert not isinstance(failure(error), Internal), changed.hex()
    reply = server.stub.Step(step(("z",), append=False, writer=""))
    assert reply.sequences[0].epoch == 0


def _records() -> tuple[Life, list[memoryview]]:
    """A log's records of something of everything."""
    life = Life(FakeDisk(), is_new=True)
    life.append("a", 3, 0)
    life.append("a", 0, 1)
    life.append("b", 6, 0, start=True)
    life.memory.fork("a", "c", 2, 0)
    life.memory.reset(["a"], release=False)
    life.memory.reset(["b"], release=True)
    life.memory.renew()
    content = life.disk.files[FOLDER / "log-00000001"]
    header = len(content.split(MAGIC)[0]) + 40
    return life, [memoryview(MAGIC + each)[header:] for each in content.split(MAGIC)[2:]]


def test_a_mutated_record_is_done_or_corrupt_even_past_its_checksum() -> None:
    life, records = _records()
    random = Random(0)
    for _ in range(ROUNDS):
        memory = life.blank()
        for record in records:
            body = bytearray(mutated(bytes(record), random)) if random.random() < 0.3 else bytearray(record)
            if not _is_done(lambda body=body, memory=memory: memory.refill().redo(*read_step(memoryview(body)))):  # type: ignore[misc]
                break
        else:
            memory.step([batch(memory.spec, "new", 1, 0)])


def test_mutated_changes_are_read_or_corrupt() -> None:
    _, records = _records()
    random = Random(1)
    for _ in range(ROUNDS * 5):
        body = memoryview(mutated(bytes(random.choice(records)), random))
        _is_done(lambda body=body: encode(decode(body)))  # type: ignore[misc]
        _is_done(lambda body=body: read_step(body))  # type: ignore[misc]


def _is_done(run: Callable[[], object]) -> bool:
    try:
        run()
    except Corrupt:
        return False
    return True
