"""What comes from outside with something changed in it at random: refused or taken, never a bug and never a crash."""

from __future__ import annotations

import os
from random import Random
from typing import TYPE_CHECKING

import grpc
import pytest

from memstore.errors import Internal
from memstore.grpc_front import SERVICE
from memstore.v1 import memstore_pb2 as pb
from tests.calling import failure
from tests.fuzz.mutating import mutated
from tests.fuzz.targets import REQUESTS, TARGETS
from tests.serving import serving, spec, step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serving import Serving

ROUNDS = int(os.environ.get("MUTATIONS", "120"))


@pytest.mark.timeout(60 + ROUNDS // 4)
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_mutated_is_taken_or_refused(name: str, tmp_path: Path) -> None:
    target, random = TARGETS[name](tmp_path), Random(name)
    for seed in target.seeds:
        target.run(seed)
    for _ in range(ROUNDS):
        content = target.mutate(random.choice(target.seeds), random)
        try:
            target.run(content)
        except BaseException as error:
            error.add_note(f"input: {content[:2000].hex()}")
            raise


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as made:
        made.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
        yield made


def test_every_call_has_a_seed() -> None:
    assert set(REQUESTS) == {method.name for method in SERVICE.methods if not method.client_streaming}


@pytest.mark.timeout(60 + ROUNDS)
def test_a_mutated_message_of_a_stream_is_answered_or_ends_the_stream(server: Serving) -> None:
    call = server.channel.stream_stream(f"/{SERVICE.full_name}/StepStream")
    content, random = pb.StepStreamRequest(call_id=3, step=step(("a", "b"), rows=2)).SerializeToString(), Random(7)
    for _ in range(ROUNDS):
        changed = mutated(content, random)
        try:
            for frame in call(iter([changed]), timeout=30):
                answer = pb.StepStreamResponse.FromString(frame)
                assert answer.failure.reason != "INTERNAL", changed.hex()
        except grpc.RpcError as error:
            assert not isinstance(failure(error), Internal), changed.hex()
    reply = server.stub.Step(step(("z",), append=False, writer=""))
    assert reply.sequences[0].epoch == 0


@pytest.mark.timeout(60 + ROUNDS)
@pytest.mark.parametrize("method", ["Step", "CreateMemory"])
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
