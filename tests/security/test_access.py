"""Access: every method that is served, with every kind of credential."""

from __future__ import annotations

import asyncio
import queue
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from memstore.access import SCOPES, Identity, check
from memstore.auth import Certificates, Credentials, Open
from memstore.door import Door
from memstore.errors import Internal, NotAllowed, NotAuthenticated
from memstore.gate import Gate
from memstore.listen import SERVER_OPTIONS
from memstore.metrics import Metrics
from memstore.outcomes import Outcomes
from memstore.quotas import Quotas
from memstore.seams import SystemClock
from memstore.tokens import Quota
from memstore.v1 import memstore_pb2 as pb
from tests.calling import Conversation, bearer, fails, failure, hashed, tokens
from tests.fakes import FakeClock
from tests.serving import Setting, serving, spec, step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serving import Serving

SERVICES = [
    *pb.DESCRIPTOR.services_by_name.values(),
    *health_pb2.DESCRIPTOR.services_by_name.values(),
    *reflection_pb2.DESCRIPTOR.services_by_name.values(),
]
METHODS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods]
NEEDED = {
    "CreateMemory": "admin",
    "DescribeMemory": "read",
    "ListMemories": "read",
    "DropMemory": "admin",
    "Step": "read",
    "StepStream": "read",
    "Retrieve": "read",
    "Append": "write",
    "Reset": "write",
    "Fork": "read,write",
    "Pin": "write",
    "ServerInfo": "read",
    "OpenPlane": "read,write",
    "Check": "",
    "List": "",
    "Watch": "",
    "ServerReflectionInfo": "",
}
"""Method -> what it needs, said once more: whoever changes the table must mean it."""
CREDENTIALS = ["none", "wrong", "expired", "read", "write", "admin", "read,write", "read,write,admin"]
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
PAST = "expires=2001-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Serving]:
    """A server with a token of every kind, all of one tenant, that has a memory; it lends."""
    scoped = [hashed(name, "red", f"scopes={name}") for name in CREDENTIALS[3:]]
    known = tokens(*scoped, hashed("expired", "red", PAST))
    with serving(Setting(authenticator=known, lends=True)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=bearer("admin"))
        yield server


def outcome(server: Serving, path: str, credential: str) -> grpc.StatusCode:
    """How an empty request is answered, whether the method streams or not."""
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = server.channel.stream_stream(path)
    answers = call(iter([b""]), metadata=() if credential == "none" else bearer(credential), timeout=20)
    try:
        content = next(answers)
    except StopIteration:
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()
    finally:
        answers.cancel()
    if path.endswith("/StepStream"):
        code = pb.StepStreamResponse.FromString(content).failure.code
        return next(each for each in grpc.StatusCode if each.value[0] == code)
    return grpc.StatusCode.OK


def test_every_method_has_its_row_and_no_row_is_left_over() -> None:
    assert set(METHODS) == set(SCOPES)
    assert {path.rpartition("/")[2] for path in METHODS} == set(NEEDED)


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_every_method_with_every_credential(guarded: Serving, path: str, credential: str) -> None:
    needed = set(filter(None, NEEDED[path.rpartition("/")[2]].split(",")))
    found = outcome(guarded, path, credential)
    if not needed:
        assert found not in REFUSALS
    elif credential in ("none", "wrong", "expired"):
        assert found is grpc.StatusCode.UNAUTHENTICATED
    elif needed <= set(credential.split(",")):
        assert found not in REFUSALS
    else:
        assert found is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("path", [path for path in METHODS if NEEDED[path.rpartition("/")[2]]])
@pytest.mark.parametrize("credential", ["none", "wrong", "expired", "other scopes"])
def test_who_may_not_call_is_refused_before_a_message_is_sent(guarded: Serving, path: str, credential: str) -> None:
    """Not a byte of it: so nobody's message is read whose credential does not reach as far as the method."""
    needed = set(NEEDED[path.rpartition("/")[2]].split(","))
    lacking = next(each for each in ("write", "admin", "read") if needed - {each} and each not in needed)
    name = lacking if credential == "other scopes" else credential
    outgoing: queue.Queue[bytes | None] = queue.Queue()
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = guarded.channel.stream_stream(path)
    before = counted(guarded, path)
    answers = call(iter(outgoing.get, None), metadata=() if name == "none" else bearer(name), timeout=15)
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert isinstance(failure(caught.value), NotAllowed if name == lacking else NotAuthenticated)
    assert "x-request-id" in dict(caught.value.trailing_metadata() or ())
    assert counted(guarded, path) == before + 1
    outgoing.put(None)


def test_a_bug_at_the_door_lets_nobody_in_and_does_not_show_its_text() -> None:
    class Broken(Open):
        """Fails."""

        def identify(self, credentials: Credentials) -> Identity:
            raise RuntimeError("of what is known")

    with serving(Setting(authenticator=Broken())) as server:
        with pytest.raises(grpc.RpcError) as caught:
            server.stub.ServerInfo(pb.ServerInfoRequest(), metadata=(("x-request-id", "mine"),))
        assert isinstance(failure(caught.value), Internal)
        assert "known" not in str(caught.value)
        assert "mine" in str(caught.value)


def test_a_certificate_is_asked_for_behind_the_door_and_the_table_before_it() -> None:
    """TLS has turned strangers away by then; the names in a certificate are known once a call is served."""
    gate, path = Gate(Certificates(), Quotas(Open(), Quota(), SystemClock())), METHODS[0]
    gate.meet(path, Credentials())
    with pytest.raises(NotAuthenticated):
        gate.enter(path, Credentials())
    with pytest.raises(NotAllowed):
        gate.meet("/grpc.channelz.v1.Channelz/Look", Credentials(common_names=("red",)))


def counted(server: Serving, path: str) -> float:
    """Calls of a method that were refused."""
    samples = (
        server.metrics.registry.get_sample_value(
            "memstore_rpc_server_duration_seconds_count", {"method": path.rpartition("/")[2], "code": code.name}
        )
        for code in REFUSALS
    )
    return sum(sample or 0.0 for sample in samples)


def test_a_method_without_a_row_is_refused_to_everybody() -> None:
    with pytest.raises(NotAllowed, match="no credential reaches this method"):
        check("/memstore.v1.MemoryService/Shred", Identity(tenant="red"))


def test_what_is_added_to_a_server_without_a_row_is_not_served() -> None:
    """Such as channelz, or a service of a library's that somebody registers."""

    async def answer(request: bytes, _: object) -> bytes:
        return request

    clock = SystemClock()
    gate = Gate(Open(), Quotas(Open(), Quota(), clock))
    door = Door(gate, Outcomes(Metrics([], "0", 0), clock), clock)

    async def run() -> grpc.StatusCode:
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=(door,))
        handlers = {"Look": grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.channelz.v1.Channelz", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await channel.unary_unary("/grpc.channelz.v1.Channelz/Look")(b"", timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code()
        finally:
            await server.stop(0)
        return grpc.StatusCode.OK

    assert asyncio.run(run()) is grpc.StatusCode.PERMISSION_DENIED


BEGINS = step(append=False)
BEGINS.sequences[0].start_of_sequence = True
CHANGES = [step(), BEGINS]


@pytest.mark.parametrize("request_", CHANGES, ids=["appends", "begins a sequence"])
def test_who_may_only_read_changes_nothing_by_a_step(guarded: Serving, request_: pb.StepRequest) -> None:
    describe = pb.DescribeMemoryRequest(name="notes")
    before = guarded.stub.DescribeMemory(describe, metadata=bearer("read"))
    error = fails(guarded, "Step", request_, metadata=bearer("read"))
    assert isinstance(error, NotAllowed)
    assert error.message == "Step: the credential needs the scope write"
    retrieve = pb.RetrieveRequest(
        memory="notes", sequences=request_.sequences, retrieve=request_.retrieve, keys=request_.keys
    )
    if request_.sequences[0].start_of_sequence:
        assert isinstance(fails(guarded, "Retrieve", retrieve, metadata=bearer("read")), NotAllowed)
    talk = Conversation(guarded, metadata=bearer("read"))
    talk.say(1, request_)
    talk.say(2, step(append=False))
    assert talk.hear().failure.reason == "NOT_ALLOWED"
    assert talk.hear().WhichOneof("outcome") == "step"  # one step that is refused leaves the stream alone
    talk.end()
    assert guarded.stub.DescribeMemory(describe, metadata=bearer("read")) == before


def test_an_open_stream_ends_when_its_token_expires() -> None:
    clock = FakeClock()
    known = tokens(hashed("t", "red", "expires=1970-01-01T00:16:50Z"), hashed("u", "red"), clock=clock)
    with serving(Setting(authenticator=known, clock=clock)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=bearer("u"))
        talk = Conversation(server, metadata=bearer("t"))
        talk.say(1, step())
        assert talk.hear().WhichOneof("outcome") == "step"
        clock.now = 1010.0
        talk.say(2, step(seq=1))
        with pytest.raises(grpc.RpcError) as caught:
            talk.hear()
        assert isinstance(failure(caught.value), NotAuthenticated)
        talk.end()
        memory = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="notes"), metadata=bearer("u")).memory
        assert memory.status.num_rows == 1
