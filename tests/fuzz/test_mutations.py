"""What comes from outside with something changed in it at random: refused or taken, never a bug and never a crash."""

from __future__ import annotations

import json
import math
import os
from random import Random
from typing import TYPE_CHECKING

import grpc
import pytest

from memstore.errors import Internal
from memstore.grpc_front import SERVICE
from memstore.v1 import memstore_pb2 as pb
from tests.calling import failure
from tests.fuzz.mutating import NESTED, ODD, mutated, mutated_json
from tests.fuzz.targets import REQUESTS, TARGETS
from tests.serving import serving, spec, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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


def changed(seed: bytes, *path: str | int, to: object) -> bytes:
    """JSON with one value replaced."""
    value = holder = json.loads(seed)
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = to
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


ONCE_A_BUG: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a head that is nested too deep": ("log-head", lambda seed: NESTED),
    "a catalogue that is nested too deep": ("catalogue", lambda seed: NESTED),
    "a name in a catalogue that is a number": ("catalogue", lambda seed: changed(seed, "memories", 0, 1, to=7)),
    "an adapter that is nested too deep": ("adapter-config", lambda seed: NESTED),
    "an adapter wider than any": ("adapter-config", lambda seed: changed(seed, "memory", "head_dim", to=1 << 62)),
    "an adapter with half a layer": (
        "adapter-config",
        lambda seed: changed(seed, "memory", "attention_layers", to=[1.5]),
    ),
    "an adapter with a truth for a width": ("adapter-config", lambda seed: changed(seed, "memory", "dim", to=True)),
    "endless rows": ("snapshot-manifest", lambda seed: changed(seed, "chunks", 0, 2, to=1 << 50)),
    "an infinite file": ("snapshot-manifest", lambda seed: changed(seed, "files", "rows.bin", "bytes", to=math.inf)),
    "a chunk of nobody's": ("snapshot-manifest", lambda seed: changed(seed, "chunks", 0, 0, to=[[]])),
    "a sequence that is an object": ("snapshot-manifest", lambda seed: changed(seed, "sequences", 0, to={})),
}


@pytest.mark.parametrize("name", ONCE_A_BUG)
def test_what_was_once_a_bug_is_refused(name: str, tmp_path: Path) -> None:
    where, change = ONCE_A_BUG[name]
    target = TARGETS[where](tmp_path)
    target.run(change(target.seeds[0]))


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as made:
        made.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
        yield made


def test_what_is_put_in_is_the_same_however_many_have_been_changed() -> None:
    before, random = repr(ODD), Random(0)
    for _ in range(1000):
        mutated_json(b'{"a":[]}', random)
    assert repr(ODD) == before


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
