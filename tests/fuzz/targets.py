"""Targets: every decoder that takes bytes from outside, ready to be given some.

A target refuses by the errors that its callers know. Anything else that it raises is a bug, and comes out of `run`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from google.protobuf.message import DecodeError

from integration import MemoryConfig, MemoryWeights, load_adapter, save_adapter
from integration.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterError
from integration.config import ConfigError as MemoryConfigError
from memstore import changes, log, wire
from memstore.catalog import FILE_NAME, FileCatalog, MemoryId
from memstore.config import ConfigError
from memstore.control import ControlBlock
from memstore.embedded import TENANT, Embedded
from memstore.entries import spec_of, text_of
from memstore.errors import Corrupt, Internal, InvalidRequest, MemstoreError, QuotaExceeded
from memstore.grpc_front import SERVICE
from memstore.journal import read_step
from memstore.lender import LentState
from memstore.log import MAGIC, SegmentReader
from memstore.memory import Memory
from memstore.plane import InlinePlane
from memstore.sequence import Reply, Writer
from memstore.service import Caller
from memstore.tokens import parse_tokens
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import leave_states
from model_client import wire as client_wire
from model_client.errors import MemstoreClientError
from tests.fakes import FakeDisk, FakeReadFile
from tests.fuzz.mutating import mutated, mutated_json
from tests.lives import FOLDER, SPEC, Life, batch
from tests.serving import spec, step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

    from google.protobuf.message import Message

DATA = Path("/data")


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder. seeds: what it takes; run: gives it something; mutate: changes a seed in its own manner."""

    seeds: Sequence[bytes]
    run: Callable[[bytes], None]
    mutate: Callable[[bytes, Random], bytes] = mutated


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


def _bodies() -> tuple[Life, list[bytes]]:
    """The bodies of a log's records of something of everything."""
    life = Life(FakeDisk(), is_new=True)
    life.append("a", 3, 0)
    life.append("a", 0, 1)
    life.append("b", 6, 0, start=True)
    life.memory.fork("a", "c", 2, 0)
    life.memory.reset(["a"], release=False)
    life.memory.reset(["b"], release=True)
    life.memory.renew()
    records = SegmentReader(FakeReadFile(life.disk.files[FOLDER / "log-00000001"])).records(None)
    return life, [bytes(record.body) for record in records if record.kind == log.STEP]


def record() -> Target:
    """A record of a log that has passed its checksum, done behind those before it; and its changes alone."""
    life, bodies = _bodies()

    def run(content: bytes) -> None:
        memory = life.blank()
        for at in range(len(bodies)):
            try:
                for body in (*bodies[:at], content):
                    memory.refill().redo(*read_step(memoryview(body)))
            except Corrupt:
                continue
            memory.step([batch(memory.spec, "new", 1, 0)])
            break
        try:
            changes.encode(changes.decode(memoryview(content)))
        except Corrupt:
            return

    return Target(bodies, run)


def segment() -> Target:
    """A file of a log, whose checksums are those of another content."""
    life, _ = _bodies()
    files = dict(life.disk.files)
    path = FOLDER / "log-00000001"

    def run(content: bytes) -> None:
        reader = SegmentReader(FakeReadFile(content))
        assert sum(len(each.body) for each in reader.records(None)) <= len(content)
        reader.synced_behind()
        life.disk.files = {**files, path: content}
        _starts(life)

    return Target([files[path]], run)


def head() -> Target:
    """What stands in the first record of a log, past its checksum."""
    life, _ = _bodies()
    files = dict(life.disk.files)
    path = FOLDER / "log-00000001"
    rest = files[path].split(MAGIC, 2)[2]
    content = b'{"boot_id":"boot 1","format":1,"identity":"m","is_behind_loss":true}'

    def run(content: bytes) -> None:
        framed = b"".join(bytes(part) for part in log.frame(log.HEAD, 1, 1, [content]))
        life.disk.files = {**files, path: framed + MAGIC + rest}
        _starts(life)

    return Target([content], run, mutated_json)


def manifest() -> Target:
    """A snapshot's manifest, past its checksum."""
    life = Life(FakeDisk(), is_new=True)
    life.append("a", 3, 0)
    life.append("b", 6, 0)
    assert life.snapshot()
    files = dict(life.disk.files)
    path = FOLDER / "snapshot-00000002" / "manifest.json"
    seed = json.dumps(json.loads(files[path])["manifest"], separators=(",", ":"), sort_keys=True).encode()

    def run(content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest().encode()
        life.disk.files = {**files, path: b'{"sha256":"' + digest + b'","manifest":' + content + b"}\n"}
        _starts(life)

    return Target([seed], run, mutated_json)


def closed() -> Target:
    """What says where a log ended."""
    life, _ = _bodies()
    life.archive.close()
    files = dict(life.disk.files)

    def run(content: bytes) -> None:
        life.disk.files = {**files, FOLDER / "closed": content}
        _starts(life)

    return Target([files[FOLDER / "closed"]], run)


def _starts(life: Life) -> None:
    """Starts over the files that are there, and does something, unless they are found to be damaged."""
    try:
        again = life.again()
    except Corrupt:
        return
    with suppress(QuotaExceeded):  # a log that is cut short may have as many sequences as there is room for
        again.append("new", 1, 0)
    again.memory.counts()


def catalogue() -> Target:
    """The file of the catalogue, and each spec in it, past their checksums."""
    text = text_of(SPEC, 1e9)
    disk = FakeDisk()

    def run(content: bytes) -> None:
        for sealed in (content, _resealed(content)):
            disk.files = {DATA / FILE_NAME: sealed}
            try:
                entries = FileCatalog(DATA, disk).load()
                for memory, each in entries.items():
                    spec_of(memory, each)
            except Corrupt:
                continue

    FileCatalog(DATA, disk).put(MemoryId("t", "m"), text)
    FileCatalog(DATA, disk).put(MemoryId("t", "n"), text)
    return Target([disk.files[DATA / FILE_NAME]], run, mutated_json)


def _resealed(content: bytes) -> bytes:
    """A catalogue with the checksum that fits it, where one can be made."""
    try:
        document = json.loads(content)
        entries = sorted(document["memories"])
        document["sha256"] = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        return json.dumps(document).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return content


def catalogue_entry() -> Target:
    """One spec as a catalogue in Redis has it."""

    def run(content: bytes) -> None:
        try:
            spec_of(MemoryId("t", "m"), content.decode(errors="replace"))
        except Corrupt:
            return

    return Target([text_of(SPEC, 1e9).encode()], run, mutated_json)


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


def adapter(name: str, folder: Path) -> Target:
    """A file of an adapter folder."""
    config = MemoryConfig(
        memory="m",
        retrieval_layer=0,
        attention_layers=(1,),
        hidden_size=8,
        dim=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    save_adapter(folder, config, MemoryWeights(config))
    seed = (folder / name).read_bytes()

    def run(content: bytes) -> None:
        (folder / name).write_bytes(content)
        try:
            load_adapter(folder)
        except (AdapterError, MemoryConfigError):
            return

    return Target([seed], run, mutated_json if name == CONFIG_FILE else mutated)


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


def tokens() -> Target:
    """The file of tokens."""

    def run(content: bytes) -> None:
        try:
            parse_tokens(content.decode(errors="replace"))
        except ConfigError:
            return

    return Target([b"# ours\nsha256:" + b"0f" * 32 + b" red\n"], run)


def _calls() -> dict[str, Callable[[Path], Target]]:
    """Every method of the contract that takes one message; the stream's is that of Step in another."""
    names = [method.name for method in SERVICE.methods if not method.client_streaming]
    return {f"request-{name}": functools.partial(_request_in, name) for name in names}


def _request_in(name: str, folder: Path) -> Target:
    return request(name)


TARGETS: dict[str, Callable[[Path], Target]] = {
    **_calls(),
    "log-record": lambda folder: record(),
    "log-segment": lambda folder: segment(),
    "log-head": lambda folder: head(),
    "snapshot-manifest": lambda folder: manifest(),
    "closed-mark": lambda folder: closed(),
    "catalogue": lambda folder: catalogue(),
    "catalogue-entry": lambda folder: catalogue_entry(),
    "claim": lambda folder: claim(),
    "control-block": lambda folder: control_block(),
    "adapter-config": lambda folder: adapter(CONFIG_FILE, folder),
    "adapter-weights": lambda folder: adapter(WEIGHTS_FILE, folder),
    "reply": lambda folder: reply(),
    "tokens": lambda folder: tokens(),
}
"""By name; each is made when it is asked for, with a folder of its own."""
