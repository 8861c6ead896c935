"""Targets: every decoder that takes bytes from outside, by name; here those of what comes over a network or socket."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from google.protobuf.message import DecodeError

from integration.adapter import CONFIG_FILE, WEIGHTS_FILE
from memstore import wire
from memstore.control import ControlBlock
from memstore.embedded import TENANT, Embedded
from memstore.errors import Corrupt, Internal, InvalidRequest, MemstoreError
from memstore.grpc_front import SERVICE
from memstore.lender import LentState
from memstore.memory import Memory
from memstore.plane import InlinePlane
from memstore.sequence import Reply, Writer
from memstore.service import Caller
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import leave_states
from model_client import wire as client_wire
from model_client.errors import MemstoreClientError
from tests.fuzz import files
from tests.fuzz.target import Target
from tests.lives import SPEC, batch
from tests.serving import spec, step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from google.protobuf.message import Message


REQUESTS: Mapping[str, Message] = {
    "CreateMemory": pb.CreateMemoryRequest(
        spec=spec("n", payloads=[pb.PayloadSpec(name="x", dtype=pb.DATA_TYPE_FP32, shape=[2])]), exist_ok=True
    ),
    "DescribeMemory": pb.DescribeMemoryRequest(name="notes"),
    "ListMemories": pb.ListMemoriesRequest(name_prefix="n"),
    "DropMemory": pb.DropMemoryRequest(name="n"),
    "Step": step(("a", "b"), rows=2),
    "Retrieve": pb.RetrieveRequest(
        memory="notes", sequences=step().sequences, retrieve=step().retrieve, keys=step().keys
    ),
    "Append": pb.AppendRequest(memory="notes", sequences=step().sequences, writer="w", keys=step().keys),
    "Fork": pb.ForkRequest(memory="notes", source="a", target="c", as_of=1),
    "Reset": pb.ResetRequest(memory="notes", sequences=["a"], release=True),
    "Pin": pb.PinRequest(memory="notes", sequences=["a"]),
    "ServerInfo": pb.ServerInfoRequest(),
    "OpenPlane": pb.OpenPlaneRequest(memory="notes", sequences=["a"], writer="w", plane=pb.PLANE_SHM),
}


@functools.cache
def _server() -> Embedded:
    """One for all calls."""
    return Embedded(capacity_bytes=256 << 20)


def request(method: str) -> Target:
    """A call of the service in this process."""
    server = _server()
    plane = InlinePlane(1 << 20)
    caller = Caller(tenant=TENANT, plane=plane)
    kind = type(REQUESTS[method])

    def call(name: str, message: Message) -> BaseException | None:
        return server._service.call(name, message, caller).exception(30)

    def run(content: bytes) -> None:
        message = _message(kind, content)
        if message is None:
            return
        call("CreateMemory", pb.CreateMemoryRequest(spec=spec(), exist_ok=True))
        error = call(method, message)
        assert error is None or (isinstance(error, MemstoreError) and not isinstance(error, Internal)), repr(error)

    return Target([REQUESTS[method].SerializeToString()], run)


def _message(kind: type[Message], content: bytes) -> Message | None:
    """A message, or None where the bytes are none."""
    try:
        return kind.FromString(content)
    except DecodeError:
        return None


def claim() -> Target:
    """What a process says on the socket of descriptors about the memory that it holds."""
    mapped = pb.MappedMemory(plane=pb.PLANE_SHM, layout=1, spec=spec(), lease=5, num_sequences=2)
    mapped.slab_bytes, mapped.block_bytes = 1 << 20, ControlBlock.make(5, 2).size_bytes
    claimed = pb.ClaimRequest(token=bytes(32), remains=mapped)

    def run(content: bytes) -> None:
        message = _message(pb.ClaimRequest, content)
        if not isinstance(message, pb.ClaimRequest):
            return
        try:
            wire.decode_mapped(message.remains)
        except InvalidRequest:
            return

    return Target([claimed.SerializeToString()], run)


def control_block() -> Target:
    """The memory that the holder of a lease shares with the server: its counters and the states that it leaves."""
    epochs = itertools.count(1).__next__
    reply = Reply(num_rows=2, fingerprint=7, as_of=0, first_position=0, begun_from=3)
    writers = OrderedDict(w=Writer(1, OrderedDict({0: reply})))
    state = LentState(name="a", place=0, epoch=4, next_position=2, floor=0, writers=writers)

    def run(content: bytes) -> None:
        memory = Memory(SPEC, torch.device("cpu"), new_epoch=epochs, is_shared=True)
        memory.step([batch(SPEC, "a", 2, 0)])
        lease = memory.lender.lend(["a", "b"], "w", lambda _: None, lambda: None)
        leave_states(lease.block, [state])
        half = len(content) // 2
        shared = min(half, 1024)
        lease.block.region.content[:shared] = torch.frombuffer(bytearray(content[:shared] or b"x"), dtype=torch.uint8)[
            :shared
        ]
        lease.block.put_state(0, content[half:])
        memory.counts()
        try:
            memory.lender.take_back(lease, wire.found_states(lease.block))
        except Corrupt:
            memory.lender.take_back(lease)
        memory.step([batch(SPEC, "a", 1, 5), batch(SPEC, "c", 1, 0)])
        memory.free()

    block = ControlBlock.make(9, 2)
    leave_states(block, [state])
    left = block.state(0)
    return Target([bytes(block.region.content[: len(left)].tolist()) + left], run)


def reply() -> Target:
    """What a server answers to a step, as the client reads it."""
    server, caller = _server(), Caller(tenant=TENANT, plane=InlinePlane(1 << 20))
    server._service.call("CreateMemory", pb.CreateMemoryRequest(spec=spec(), exist_ok=True), caller).result(30)
    server._service.call("Step", step(("reply",), rows=3), caller).result(30)
    asked = step(("reply",), rows=2, append=False, writer="")
    answer = server._service.call("Step", asked, caller).result(30)
    plane, host = client_wire.InlinePlane(), torch.device("cpu")

    def run(content: bytes) -> None:
        message = _message(pb.StepResponse, content)
        if isinstance(message, pb.StepResponse):
            try:
                client_wire.step_result(plane, message, host)
            except MemstoreClientError:
                return

    return Target([answer.SerializeToString()], run)


def _calls() -> dict[str, Callable[[Path], Target]]:
    """Every method of the contract that takes one message; the stream's is that of Step in another."""
    names = [method.name for method in SERVICE.methods if not method.client_streaming]
    return {f"request-{name}": functools.partial(_request_in, name) for name in names}


def _request_in(name: str, folder: Path) -> Target:
    return request(name)


TARGETS: dict[str, Callable[[Path], Target]] = {
    **_calls(),
    "log-record": lambda folder: files.record(),
    "log-segment": lambda folder: files.segment(),
    "log-head": lambda folder: files.head(),
    "snapshot-manifest": lambda folder: files.manifest(),
    "closed-mark": lambda folder: files.closed(),
    "catalogue": lambda folder: files.catalogue(),
    "catalogue-entry": lambda folder: files.catalogue_entry(),
    "claim": lambda folder: claim(),
    "control-block": lambda folder: control_block(),
    "adapter-config": lambda folder: files.adapter(CONFIG_FILE, folder),
    "adapter-weights": lambda folder: files.adapter(WEIGHTS_FILE, folder),
    "reply": lambda folder: reply(),
    "spill-file": lambda folder: files.spilled(),
    "tokens": lambda folder: files.tokens(),
}
"""By name; each is made when it is asked for, with a folder of its own."""
