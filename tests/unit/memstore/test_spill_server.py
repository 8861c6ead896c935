"""Sequences that are spilled and end, in a server: killed, read by metrics and commands, lent, and by the clock."""

from __future__ import annotations

import itertools
import signal
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.errors import DeviceMemoryFull, InvalidRequest, NotFound, NotReady, QuotaExceeded
from memstore.expirer import Expirer
from memstore.memory import Memory
from memstore.reply_bytes import A_WRITER_BYTES
from memstore.store import spilled_bytes
from memstore.types import Durability, MemorySpec, SpillSpec, StepResult
from memstore.v1 import memstore_pb2 as pb
from tests.calling import fails
from tests.fakes import FakeClock, FakeDisk
from tests.leasing import until
from tests.lives import batch, found
from tests.processes import Process
from tests.serving import Setting, file_store, serving, spec, step

if TYPE_CHECKING:
    from memstore.v1.memstore_pb2_grpc import MemoryServiceStub

DATA = Path("/data")
SPILL = pb.SpillSpec(max_sequences=4, host_sequences=1)
NAMES = "abcdef"


def _answers(stub: MemoryServiceStub, memory: str) -> dict[str, bytes]:
    """What is found in each sequence, byte for byte."""
    requests = {name: step((name,), rows=2, memory=memory, append=False, writer="") for name in NAMES}
    return {name: stub.Step(each).SerializeToString(deterministic=True) for name, each in requests.items()}


def _num_files(data: Path) -> int:
    return sum(path.is_file() for path in (data / "spilled").rglob("*"))


def _num_on_disk(stub: MemoryServiceStub, memory: str) -> int:
    return stub.DescribeMemory(pb.DescribeMemoryRequest(name=memory)).memory.status.spill.num_on_disk


@pytest.mark.timeout(180)
@pytest.mark.parametrize("takes_snapshots", [False, True], ids=["log", "snapshots"])
def test_a_killed_server_has_lost_nothing_that_was_spilled(
    takes_snapshots: bool, tmp_path: Path, started: list[Process]
) -> None:
    arguments = ("--port", "0", *(("--snapshot-interval", "0.1") if takes_snapshots else ()))
    started.append(Process(tmp_path, *arguments))
    stub = started[0].connect()
    for name, durability in (("lasting", pb.DURABILITY_INTERVAL), ("fleeting", pb.DURABILITY_VOLATILE)):
        made = spec(name, max_sequences=2, durability=durability, spill=SPILL)
        stub.CreateMemory(pb.CreateMemoryRequest(spec=made))
    for seq in range(3):
        for sequence in NAMES:
            for name in ("lasting", "fleeting"):
                stub.Step(step((sequence,), rows=5, seq=seq, memory=name))
    stub.Pin(pb.PinRequest(memory="lasting", sequences=["b"]))
    answers = _answers(stub, "lasting")
    assert _answers(stub, "fleeting") == _answers(stub, "fleeting")
    status = stub.DescribeMemory(pb.DescribeMemoryRequest(name="lasting")).memory.status
    where = status.spill.num_resident, status.spill.num_on_host, status.spill.num_on_disk
    # what a snapshot is being written of keeps its place, and then the next goes on to a file
    assert where in ([(2, 1, 3), (2, 0, 4)] if takes_snapshots else [(2, 1, 3)])
    # files that a snapshot is being written of go once it is whole
    until(lambda: _num_files(tmp_path) == _num_on_disk(stub, "lasting") + _num_on_disk(stub, "fleeting"))
    for path in (tmp_path / "spilled").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    started[0].tell(signal.SIGKILL)
    started[0].end()

    started.append(Process(tmp_path, *arguments))
    stub = started[1].connect()
    assert _answers(stub, "lasting") == answers
    resent = stub.Step(step(("c",), rows=5, seq=2, memory="lasting")).sequences[0]
    assert (resent.is_replay, resent.first_position) == (True, 10)
    assert stub.DescribeMemory(pb.DescribeMemoryRequest(name="lasting")).memory.status.num_pinned == 1
    assert stub.DescribeMemory(pb.DescribeMemoryRequest(name="fleeting")).memory.status.num_sequences == 0
    until(lambda: _num_files(tmp_path) == _num_on_disk(stub, "lasting") >= 3)
    stub.DropMemory(pb.DropMemoryRequest(name="lasting"))
    assert _num_files(tmp_path) == 0
    started[1].tell(signal.SIGTERM)
    assert started[1].end()[0] == 0
    assert not (tmp_path / "spilled").exists()


def test_idle_sequences_end_by_the_clock_of_the_server() -> None:
    clock = FakeClock()
    disk = FakeDisk()
    with serving(Setting(clock=clock, store=file_store(DATA, disk, clock))) as server:
        made = spec("m", idle_ttl_s=60, durability=pb.DURABILITY_ALWAYS)
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=made))
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("lasting")))
        server.stub.Step(step(("a", "b"), memory="m"))
        server.stub.Step(step(("a", "b"), memory="lasting"))
        server.stub.Pin(pb.PinRequest(memory="m", sequences=["b"]))
        expirer = Expirer(server.registry)
        try:
            clock.advance(59)
            expirer.check()
            assert server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="m")).memory.status.num_sequences == 2
            clock.advance(1)
            expirer.check()
            status = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="m")).memory.status
            assert (status.num_sequences, status.expired_sequences, status.num_pinned) == (1, 1, 1)
            lines = server.metrics.text().decode().splitlines()
            assert 'memstore_expired_sequences_total{memory="m"} 1.0' in lines
            assert 'memstore_pinned_sequences{memory="m"} 1.0' in lines
            disk.is_full = True
            server.stub.Pin(pb.PinRequest(memory="lasting", sequences=["a"], unpin=True))
            loaded = server.registry.find("default", "m")
            loaded.engine._table["b"].is_pinned = False
            clock.advance(60)
            expirer.check()  # the log cannot be written: said, and tried again
            disk.is_full = False
            expirer.check()
            assert server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="m")).memory.status.num_sequences == 0
        finally:
            expirer.close()
        status = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="lasting")).memory.status
        assert status.num_sequences == 2


def test_where_sequences_lie_is_shown() -> None:
    disk = FakeDisk()
    with serving(Setting(store=file_store(DATA, disk, FakeClock()))) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("m", max_sequences=2, spill=SPILL)))
        for sequence in NAMES:
            server.stub.Step(step((sequence,), memory="m"))
        server.stub.Step(step(("a",), memory="m", append=False, writer=""))
        status = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="m")).memory.status.spill
        assert (status.spills, status.returns) == (5, 1)
        assert status.disk_bytes == sum(len(content) for path, content in disk.files.items() if "spilled" in path.parts)
        assert status.host_bytes == 2 * 8 * (4 * 4 + 4) + A_WRITER_BYTES
        lines = server.metrics.text().decode().splitlines()
        for line in (
            'memstore_sequences{memory="m",tier="device"} 2.0',
            'memstore_sequences{memory="m",tier="host"} 1.0',
            'memstore_sequences{memory="m",tier="disk"} 3.0',
            'memstore_spills_total{memory="m"} 5.0',
            'memstore_spill_returns_total{memory="m"} 1.0',
            f'memstore_spilled_bytes{{memory="m"}} {float(status.disk_bytes)}',
        ):
            assert line in lines, line


def test_a_server_without_files_spills_to_host_memory_only() -> None:
    with serving() as server:
        error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec("m", spill=SPILL)))
        assert isinstance(error, InvalidRequest)
        assert error.metadata["field"] == "spec.spill.host_sequences"
        whole = pb.SpillSpec(max_sequences=2, host_sequences=2)
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("m", max_sequences=1, spill=whole)))
        for sequence in "abc":
            server.stub.Step(step((sequence,), memory="m"))
        assert isinstance(fails(server, "Step", step(("d",), memory="m")), QuotaExceeded)
        assert isinstance(fails(server, "Step", step(("a", "b"), memory="m")), QuotaExceeded)
        assert isinstance(fails(server, "Pin", pb.PinRequest(memory="m", sequences=["x"])), NotFound)


def test_host_memory_that_is_not_there_is_refused_at_create() -> None:
    with serving(Setting(capacity_bytes=3000)) as server:
        many = pb.SpillSpec(max_sequences=100, host_sequences=100)
        error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec("m", max_sequences=1, spill=many)))
        assert isinstance(error, DeviceMemoryFull)
        assert server.registry.budget.reserved_bytes == 0


def test_files_are_counted_in_the_disk_quota() -> None:
    disk = FakeDisk()
    some = MemorySpec(name="m", dim=4, capacity=8, max_sequences=1, spill=SpillSpec(max_sequences=3, host_sequences=1))
    each = 8 * (2 * 4 + 4) + (1 << 20)
    assert spilled_bytes(some) == 3 * each
    assert spilled_bytes(replace(some, durability=Durability.ALWAYS)) == 8 * each
    assert spilled_bytes(replace(some, spill=SpillSpec(max_sequences=3, host_sequences=3))) == 0
    store = file_store(DATA, disk, FakeClock(), quota_bytes=7 * each)
    with serving(Setting(store=store)) as server:
        small = pb.MemorySpec(
            dim=4, capacity=8, dtype=pb.DATA_TYPE_FP16, spill=pb.SpillSpec(max_sequences=3, host_sequences=1)
        )
        for name in ("one", "two"):
            small.name = name
            server.stub.CreateMemory(pb.CreateMemoryRequest(spec=small))
        small.name = "three"
        assert isinstance(fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=small)), QuotaExceeded)
        server.stub.DropMemory(pb.DropMemoryRequest(name="one"))
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=small))


def test_what_an_earlier_server_spilled_is_removed() -> None:
    disk = FakeDisk()
    disk.files[DATA / "spilled" / "t" / "m" / "sequence-00000000"] = b"old"
    file_store(DATA, disk, FakeClock())
    disk.files[DATA / "spilled" / "t" / "n" / "sequence-00000000"] = (
        b"of one that ended before it had removed the other"
    )
    store = file_store(DATA, disk, FakeClock())
    assert not [path for path in disk.files if DATA / "spilled" in path.parents], "nothing is in the way"
    store.remove_rest()
    assert not disk.files


def test_what_is_lent_stays_and_is_asked_back_when_nothing_else_can_leave() -> None:
    made = MemorySpec(
        name="m",
        dim=2,
        capacity=4,
        max_sequences=2,
        spill=SpillSpec(max_sequences=2, host_sequences=2),
        idle_ttl_s=60,
    )
    memory = Memory(made, torch.device("cpu"), new_epoch=itertools.count(1).__next__, is_shared=True)
    memory.lifecycle.clock = clock = FakeClock()
    for name in "abc":
        memory.step([batch(made, name, 3, 0, value=ord(name))])
    assert memory._table["a"].place >= 2
    recalled: list[int] = []
    lease = memory.lender.lend(["a"], "w", recalled.append, lambda: None)
    assert memory._table["a"].place < 2, "it came back to be lent"
    (state,) = memory.lender.states(lease)
    assert (state.next_position, len(state.writers)) == (3, 1)
    for name in "bcb":
        (done,) = memory.step([batch(made, name, 0, 1, writer="")])
        assert isinstance(done, StepResult)
        assert memory._table["a"].place < 2, "it is lent"
    with pytest.raises(QuotaExceeded):
        memory.lender.lend(["b", "c", "d"], "v", recalled.append, lambda: None)
    other = memory.lender.lend(["b"], "v", recalled.append, lambda: None)
    (refused,) = memory.step([batch(made, "c", 1, 1)])
    assert isinstance(refused, NotReady)
    assert recalled == [lease.number]
    clock.advance(60)
    assert memory.expire() == 1, "c; what is lent has not been idle"
    memory.lender.take_back(lease)
    assert memory.expire() == 0, "that was its last use"
    memory.step([batch(made, "d", 1, 0)])
    memory.step([batch(made, "e", 1, 0)])
    assert found(memory, "e").sequences[0].as_of == 1
    assert memory._table["b"].place < 2
    memory.lender.take_back(other)
    assert found(memory, "a").sequences[0].as_of == 3
    clock.advance(60)
    assert memory.expire() == 4
