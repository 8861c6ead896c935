"""Quotas: what tenants may take, to the byte, the sequence and the call."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from memstore.auth import Certificates, Credentials, authenticator_of
from memstore.config import Config
from memstore.errors import Overloaded, QuotaExceeded
from memstore.followed import Followed
from memstore.gate import Gate
from memstore.lending import MAX_LEASES, MAX_LENT, TENANT_LEASES
from memstore.memory import Memory
from memstore.quotas import MAX_TENANTS, SEQUENCES_A_LEASE, Held, Lent, Quotas
from memstore.server import default_quota
from memstore.tokens import Quota
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import decode_spec
from tests.calling import Conversation, bearer, fails, failure, hashed, tokens
from tests.fakes import FakeClock, FakeDisk
from tests.serving import Setting, file_store, on_disk, serving, spec, step

DATA = Path("/data")

SIZE = Memory.bytes_needed(decode_spec(spec()), torch.device("cpu"))


def quotas(*lines: str, default: Quota | None = None, clock: FakeClock | None = None) -> Quotas:
    """Those of a token file with these lines."""
    return Quotas(tokens(hashed("t", "red"), *lines), default or Quota(), clock or FakeClock())


def test_what_the_file_does_not_say_is_the_default() -> None:
    default = Quota(reserved_bytes=1, sequences=2, calls_per_s=3.0, leases=4)
    made = quotas("quota red bytes=8G leases=5", default=default)
    assert made.of("red") == Quota(reserved_bytes=8 << 30, sequences=2, calls_per_s=3.0, leases=5)
    assert made.of("blue") == default


@pytest.mark.parametrize("name", ["bytes", "sequences"])
def test_a_quota_is_reached_and_not_passed(name: str) -> None:
    made = quotas(f"quota red {name}=100")

    def held(number: int) -> Held:
        return Held(reserved_bytes=number, sequences=0) if name == "bytes" else Held(reserved_bytes=0, sequences=number)

    made.check("red", held(60), held(40))
    made.check("blue", held(600), held(40))
    with pytest.raises(QuotaExceeded, match=f"quota {name}: .* 41; 100 are allowed, and 60 are reserved") as caught:
        made.check("red", held(60), held(41))
    assert caught.value.metadata == {"quota": name, "limit": "100", "held": "60", "needed": "41"}


def test_leases_and_their_sequences_are_reached_and_not_passed() -> None:
    made = quotas("quota red leases=3")
    made.check_lent("red", Lent(leases=2, sequences=0), num_sequences=3 * SEQUENCES_A_LEASE)
    made.check_lent("blue", Lent(leases=200, sequences=0), num_sequences=8000)
    with pytest.raises(QuotaExceeded, match="quota leases: 3 are allowed, and 3 are held") as caught:
        made.check_lent("red", Lent(leases=3, sequences=3), num_sequences=1)
    assert caught.value.metadata == {"quota": "leases", "limit": "3", "held": "3", "needed": "1"}
    with pytest.raises(QuotaExceeded, match="quota leases: of sequences 96 can be lent, 60 are, and 37 are asked for"):
        made.check_lent("red", Lent(leases=1, sequences=60), num_sequences=37)


def test_calls_are_counted_over_time() -> None:
    clock = FakeClock()
    made = quotas("quota red calls_per_s=10", clock=clock)
    for _ in range(10):
        made.call("red")
    with pytest.raises(Overloaded, match="quota calls_per_s: 10 calls a second are allowed") as caught:
        made.call("red")
    assert caught.value.retry_delay_s == pytest.approx(0.1)
    made.call("blue")
    clock.advance(caught.value.retry_delay_s)
    made.call("red")
    with pytest.raises(Overloaded):
        made.call("red")
    clock.advance(1000)
    served = 0
    for _ in range(50):
        try:
            made.call("red")
        except Overloaded:
            continue
        served += 1
    assert served == 10  # what was not used in an hour is not there at once


def test_less_than_one_call_a_second_is_one_call_now_and_then() -> None:
    clock = FakeClock()
    made = quotas("quota red calls_per_s=0.5", clock=clock)
    made.call("red")
    with pytest.raises(Overloaded) as caught:
        made.call("red")
    assert caught.value.retry_delay_s == pytest.approx(2.0)


def test_quiet_tenants_are_forgotten() -> None:
    clock = FakeClock()
    made = quotas(default=Quota(calls_per_s=1.0), clock=clock)
    for number in range(MAX_TENANTS):
        made.call(f"t{number}")
    clock.advance(0.5)
    made.call("late")
    clock.advance(0.5)
    made.call("next")
    assert set(made._calls) == {"late", "next"}


def test_a_memory_beyond_a_quota_is_refused_and_dropping_gives_room() -> None:
    known = tokens(hashed("r", "red"), hashed("b", "blue"), "quota red sequences=10")
    with serving(Setting(authenticator=known)) as server:
        create = pb.CreateMemoryRequest(spec=spec("one", max_sequences=6))
        server.stub.CreateMemory(create, metadata=bearer("r"))
        more = pb.CreateMemoryRequest(spec=spec("two", max_sequences=5))
        error = fails(server, "CreateMemory", more, metadata=bearer("r"))
        assert isinstance(error, QuotaExceeded)
        assert error.metadata == {"quota": "sequences", "limit": "10", "held": "6", "needed": "5"}
        server.stub.CreateMemory(more, metadata=bearer("b"))
        server.stub.DropMemory(pb.DropMemoryRequest(name="one"), metadata=bearer("r"))
        server.stub.CreateMemory(more, metadata=bearer("r"))


@pytest.mark.parametrize(("line", "bound"), [("quota red leases=2", 2), ("", TENANT_LEASES)])
def test_no_tenant_takes_all_leases(line: str, bound: int) -> None:
    """What was offered and not yet presented counts too."""
    known = tokens(hashed("r", "red"), hashed("b", "blue"), line)
    default = default_quota(Config(), has_tenants=known.has_tenants)
    with serving(Setting(authenticator=known, lends=True, quota=default)) as server:
        lend = pb.OpenPlaneRequest(memory="notes", sequences=["a"], writer="w")
        for metadata in (bearer("r"), bearer("b")):
            server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=metadata)
        for _ in range(bound):
            server.stub.OpenPlane(lend, metadata=bearer("r"))
        error = fails(server, "OpenPlane", lend, metadata=bearer("r"))
        assert isinstance(error, QuotaExceeded)
        assert error.metadata == {"quota": "leases", "limit": f"{bound}", "held": f"{bound}", "needed": "1"}
        server.stub.OpenPlane(lend, metadata=bearer("b"))


def test_where_everyone_is_one_tenant_it_may_have_all_leases_unless_told_otherwise() -> None:
    assert default_quota(Config(), has_tenants=False).leases == 0
    assert default_quota(Config(tenant_leases=7), has_tenants=False).leases == 7
    assert default_quota(Config(tenant_leases=7), has_tenants=True).leases == 7
    assert 0 < TENANT_LEASES <= MAX_LEASES // 4
    assert MAX_LENT == MAX_LEASES * SEQUENCES_A_LEASE


def test_bytes_of_all_memories_of_a_tenant_are_bounded_and_told() -> None:
    known = tokens(hashed("r", "red"), hashed("b", "blue"))
    with serving(Setting(authenticator=known, quota=Quota(reserved_bytes=SIZE + 10))) as server:
        made = server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=bearer("r")).memory
        error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec("two")), metadata=bearer("r"))
        assert isinstance(error, QuotaExceeded)
        assert error.metadata["quota"] == "bytes"
        told = server.stub.ServerInfo(pb.ServerInfoRequest(), metadata=bearer("r"))
        assert (told.capacity_bytes, told.reserved_bytes) == (SIZE + 10, made.status.reserved_bytes)
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("two")), metadata=bearer("b"))


def test_calls_beyond_the_quota_are_refused_with_a_delay_on_a_stream_too() -> None:
    clock = FakeClock()
    known = tokens(hashed("r", "red"), hashed("b", "blue"), "quota red calls_per_s=3", clock=clock)
    with serving(Setting(authenticator=known, clock=clock)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=bearer("r"))
        talk = Conversation(server, metadata=bearer("r"))
        for seq in range(3):
            talk.say(seq, step(seq=seq))
        assert [talk.hear().WhichOneof("outcome") for _ in range(2)] == ["step", "step"]
        failure = talk.hear().failure
        assert failure.reason == "OVERLOADED"
        assert failure.retry_delay.ToMilliseconds() == 333
        assert isinstance(fails(server, "ListMemories", pb.ListMemoriesRequest(), metadata=bearer("r")), Overloaded)
        server.stub.ListMemories(pb.ListMemoriesRequest(), metadata=bearer("b"))
        clock.advance(0.34)
        talk.say(3, step(seq=2))
        assert talk.hear().step.sequences[0].first_position == 2  # the one that was refused was not done
        talk.end()


def test_a_call_beyond_the_quota_is_refused_before_its_message_is_sent() -> None:
    """Not a byte of it: or a tenant that floods a server would have it read whatever it sends."""
    clock = FakeClock()
    known = tokens(hashed("r", "red"), "quota red calls_per_s=2", clock=clock)
    with serving(Setting(authenticator=known, clock=clock)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=bearer("r"))
        server.stub.Step(step(), metadata=bearer("r"))
        outgoing: queue.Queue[bytes | None] = queue.Queue()
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = server.channel.stream_stream(
            "/memstore.v1.MemoryService/Step"
        )
        answers = call(iter(outgoing.get, None), metadata=bearer("r"), timeout=15)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        error = failure(caught.value)
        assert isinstance(error, Overloaded)
        assert error.retry_delay_s == pytest.approx(0.5)
        outgoing.put(None)
        clock.advance(0.5)
        server.stub.Step(step(seq=1), metadata=bearer("r"))  # what was refused was not counted
        assert isinstance(fails(server, "Step", step(seq=2), metadata=bearer("r")), Overloaded)


def test_where_certificates_name_the_tenant_calls_are_counted_once_it_is_known() -> None:
    clock = FakeClock()
    made = Quotas(Certificates(), Quota(calls_per_s=1), clock)
    gate, path, red = (
        Gate(Certificates(), made),
        "/memstore.v1.MemoryService/ServerInfo",
        Credentials(common_names=("red",)),
    )
    for _ in range(3):
        gate.meet(path, Credentials())
    gate.admit(path, gate.enter(path, red), pb.ServerInfoRequest())
    with pytest.raises(Overloaded):
        gate.admit(path, gate.enter(path, red), pb.ServerInfoRequest())


def spilling(
    name: str = "m", *, durability: pb.Durability.ValueType = pb.DURABILITY_VOLATILE
) -> pb.CreateMemoryRequest:
    """A memory of one place, whose other sequences are all in files."""
    made = spec(name, max_sequences=1, durability=durability, spill=pb.SpillSpec(max_sequences=5))
    return pb.CreateMemoryRequest(spec=made)


def test_bytes_of_spilled_sequences_are_bounded_over_all_memories_of_a_tenant() -> None:
    disk = FakeDisk()
    known = tokens(hashed("r", "red"), hashed("b", "blue"), "quota red spilled_bytes=1K")
    with serving(Setting(authenticator=known, store=file_store(DATA, disk, FakeClock()))) as server:
        for tenant in "rb":
            for name in ("m", "n"):
                server.stub.CreateMemory(spilling(name), metadata=bearer(tenant))

        def use(name: str, sequence: str, tenant: str = "r") -> None:
            server.stub.Step(step((sequence,), memory=name), metadata=bearer(tenant))

        def refused(name: str, sequence: str) -> QuotaExceeded:
            error = fails(server, "Step", step((sequence,), memory=name), metadata=bearer("r"))
            assert isinstance(error, QuotaExceeded)
            return error

        def held() -> int:
            return sum(len(content) for path, content in disk.files.items() if {"spilled", "red"} <= set(path.parts))

        use("m", "a")
        use("m", "b")
        size = held()
        use("n", "a")
        number = 0
        while held() + size + 8 < 1024:  # names may be longer
            number += 1
            use("n", f"b{number}")
        before = dict(disk.files)
        error = refused("n", "c")
        assert "quota spilled_bytes" in str(error)
        assert (error.metadata["quota"], error.metadata["limit"]) == ("spilled_bytes", "1024")
        assert int(error.metadata["held"]) == held()
        assert 1024 - held() < int(error.metadata["needed"]) <= size + 8
        refused("m", "c")
        assert disk.files == before, "nothing was moved"
        use("n", f"b{number}")  # it has its place
        for sequence in "abcdef":
            use("m", sequence, "b")
        lines = server.metrics.text().decode().splitlines()
        assert 'memstore_spill_refusals_total{memory="other"} 2.0' in lines
        server.stub.Reset(pb.ResetRequest(memory="m", sequences=["a"], release=True), metadata=bearer("r"))
        use("n", "c")
        refused("n", "d")
        server.stub.DropMemory(pb.DropMemoryRequest(name="n"), metadata=bearer("r"))
        for sequence in "cd":
            use("m", sequence)


def test_the_devices_thread_never_waits_for_the_disk_that_the_token_file_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{hashed('r', 'red')}\nquota red spilled_bytes=1M calls_per_s=1000\n")
    monkeypatch.setattr("memstore.auth.FOLLOW_S", 0.0)
    known = authenticator_of(Config(token_file=path), FakeClock())
    lookers: set[str] = set()
    look = Followed._look

    def watch(followed: Followed[Any]) -> Any:
        lookers.add(threading.current_thread().name)
        return look(followed)

    monkeypatch.setattr(Followed, "_look", watch)
    disk = FakeDisk()
    with serving(Setting(authenticator=known, store=file_store(DATA, disk, FakeClock()))) as server:
        server.stub.CreateMemory(spilling(), metadata=bearer("r"))
        for sequence in "abc":
            server.stub.Step(step((sequence,), memory="m"), metadata=bearer("r"))
        assert [path for path in disk.files if "spilled" in path.parts]
    assert lookers
    assert not [name for name in lookers if name.startswith("memstore-")]


def test_a_quota_that_is_lowered_keeps_no_memory_from_being_loaded() -> None:
    disk = FakeDisk()
    with serving(on_disk(DATA, disk)) as server:
        server.stub.CreateMemory(spilling(durability=pb.DURABILITY_INTERVAL))
        for sequence in "abc":
            server.stub.Step(step((sequence,), memory="m"))
    few = Quota(spilled_bytes=10)
    with serving(replace(on_disk(DATA, disk), quota=few)) as server:
        error = fails(server, "Step", step(("d",), memory="m"))
        assert isinstance(error, QuotaExceeded)
        assert error.metadata["quota"] == "spilled_bytes"
        server.stub.Reset(pb.ResetRequest(memory="m", sequences=["a", "b"], release=True))
        server.stub.Step(step(("c",), seq=1, memory="m"))
