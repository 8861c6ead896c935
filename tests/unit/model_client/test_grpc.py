"""The gRPC transport: where a token may go, streams that break, servers that leave and come back, forks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from concurrent import futures
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest.mock import Mock

import grpc
import pytest
import torch

from memstore.v1 import memstore_pb2 as pb
from memstore.v1 import memstore_pb2_grpc
from model_client import MemoryClient, Retrieval, errors
from model_client.transport.grpc import MAX_MESSAGE_BYTES, GrpcOptions, is_local
from tests.calling import hashed, tokens
from tests.fakes import FakeClock
from tests.serving import Setting, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.serving import Serving


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as running:
        with MemoryClient(running.target) as client:
            client.create_memory("m", dim=4, capacity=32, max_sequences=16, dtype=torch.float32)
        yield running


Stream: TypeAlias = "Callable[[Iterator[pb.StepStreamRequest], Any], Iterator[pb.StepStreamResponse]]"
Unary: TypeAlias = "Callable[[pb.StepRequest, Any], pb.StepResponse]"


TOKEN = "x" * 8


class Servicer(memstore_pb2_grpc.MemoryServiceServicer):
    """A server of another make, that answers as the test says."""

    def __init__(self, stream: Stream, step: Unary | None) -> None:
        self.stream = stream
        self.step = step
        self.metadata: list[dict[str, str]] = []
        self.num_streams = 0

    def Step(self, request: pb.StepRequest, context: Any) -> pb.StepResponse:
        self.metadata.append({str(key): str(value) for key, value in context.invocation_metadata()})
        return self.step(request, context) if self.step else answer_to(request)

    def StepStream(self, requests: Iterator[pb.StepStreamRequest], context: Any) -> Iterator[pb.StepStreamResponse]:
        self.num_streams += 1
        yield from self.stream(requests, context)


def servicing(stream: Stream, step: Unary | None = None) -> Servicer:
    """A servicer that knows nothing but steps."""
    return Servicer(stream, step)  # type: ignore[abstract]


def answer_to(request: pb.StepRequest) -> pb.StepResponse:
    results = [pb.SequenceResult(epoch=7, num_appended=part.num_rows) for part in request.sequences]
    return pb.StepResponse(sequences=results)


def unimplemented(requests: Iterator[pb.StepStreamRequest], context: Any) -> Iterator[Any]:
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "no streams here")
    yield


@contextmanager
def other_server(servicer: Servicer, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    with futures.ThreadPoolExecutor(4) as pool:
        running = grpc.server(pool)
        memstore_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, running)
        if credentials is None:
            port = running.add_insecure_port("127.0.0.1:0")
        else:
            port = running.add_secure_port("127.0.0.1:0", credentials)
        running.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            running.stop(0).wait()


def append(client: MemoryClient, rows: int = 1, memory: str = "m") -> pb.SequenceResult:
    return client.session(memory, ["a"]).append(torch.ones(rows, 4), [rows]).sequences[0]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("unix:///run/memstore.sock", True),
        ("unix-abstract:memstore", True),
        ("127.0.0.1:7077", True),
        ("127.9.9.9:7077", True),
        ("localhost:7077", True),
        ("[::1]:7077", True),
        ("dns:///localhost:7077", True),
        ("10.0.0.1:7077", False),
        ("[2001:db8::1]:7077", False),
        ("memstore.example:7077", False),
        ("localhost.example:7077", False),
    ],
)
def test_what_stays_on_this_host(target: str, expected: bool) -> None:
    assert is_local(target) is expected


def test_a_token_does_not_travel_in_the_clear() -> None:
    with pytest.raises(ValueError, match="in the clear"):
        MemoryClient("10.0.0.1:7077", token=TOKEN)
    for options in ({"allow_insecure_token": True}, {"tls_root": b"pem"}):
        made = GrpcOptions.of("10.0.0.1:7077", {"token": TOKEN, **options})  # type: ignore[typeddict-item]
        assert made.metadata == (("authorization", f"Bearer {TOKEN}"),)
        assert TOKEN not in repr(made)


def test_the_token_is_sent_with_every_call() -> None:
    seen: list[dict[str, str]] = []

    def stream(requests: Iterator[pb.StepStreamRequest], context: Any) -> Iterator[Any]:
        seen.append({str(key): str(value) for key, value in context.invocation_metadata()})
        for request in requests:
            yield pb.StepStreamResponse(call_id=request.call_id, step=answer_to(request.step))

    servicer = servicing(stream)
    with other_server(servicer) as target:
        for use_stream in (True, False):
            with MemoryClient(target, token=TOKEN, use_stream=use_stream) as client:
                append(client)
    assert seen[0]["authorization"] == servicer.metadata[0]["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("use_stream", [True, False], ids=["stream", "unary"])
def test_a_session_goes_on_with_the_next_token(use_stream: bool) -> None:
    clock, now = FakeClock(), ["old"]
    known = tokens(hashed("old", "red", "expires=1970-01-01T00:16:50Z"), hashed("new", "red"), clock=clock)
    options: dict[str, Any] = {"plane": "inline", "use_stream": use_stream, "timeout_s": 20.0}
    with (
        serving(Setting(authenticator=known)) as server,
        MemoryClient(server.target, token=lambda: now[0], **options) as client,
    ):
        client.create_memory("m", dim=2, capacity=8, max_sequences=1, dtype=torch.float32)
        session = client.session("m", ["a"])
        assert session.append(torch.ones(1, 2), [1]).sequences[0].first_position == 0
        clock.now = 1010.0
        with pytest.raises(errors.NotAuthenticated):
            session.append(torch.ones(1, 2), [1])
        now[0] = "new"
        assert session.append(torch.ones(1, 2), [1]).sequences[0].first_position == 1
        assert client.describe_memory("m").status.num_rows == 2


def test_a_root_certificate_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(b"certificate")
    assert GrpcOptions.of("x:1", {"tls_root": str(path)}).tls_root == b"certificate"
    assert GrpcOptions.of("x:1", {"tls_root": b"certificate"}).tls_root == b"certificate"


def test_over_tls_the_token_travels_and_strangers_are_not_believed(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    servicer = servicing(unimplemented)
    pair = (key.read_bytes(), cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], cert.read_bytes(), require_client_auth=True)
    known = {"tls_root": str(cert), "tls_cert": str(cert), "tls_key": key.read_bytes()}
    with other_server(servicer, credentials) as target:
        port = target.rpartition(":")[2]
        with MemoryClient(f"localhost:{port}", token=TOKEN, timeout_s=20.0, **known) as client:  # type: ignore[arg-type]
            append(client)
        assert servicer.metadata[0]["authorization"] == f"Bearer {TOKEN}"
        another_name = MemoryClient(target, timeout_s=0.2, **known)  # type: ignore[arg-type]
        no_certificate = MemoryClient(f"localhost:{port}", timeout_s=0.2, tls_root=cert.read_bytes())
        for client in (another_name, no_certificate):
            with client, pytest.raises((errors.Unavailable, errors.Late)):
                append(client)
    assert len(servicer.metadata) == 1


def test_without_streams_steps_are_unary_for_good() -> None:
    servicer = servicing(unimplemented)
    with other_server(servicer) as target, MemoryClient(target) as client:
        session = client.session("m", ["a"])
        for _ in range(3):
            assert session.append(torch.ones(2, 4), [2]).sequences[0].num_appended == 2
    assert servicer.num_streams == 1


def test_a_stream_that_breaks_is_followed_by_unary_calls() -> None:
    def once(requests: Iterator[pb.StepStreamRequest], context: Any) -> Iterator[Any]:
        request = next(requests)
        yield pb.StepStreamResponse(call_id=request.call_id, step=answer_to(request.step))
        next(requests)
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    servicer = servicing(once)
    with other_server(servicer) as target, MemoryClient(target) as client:
        session = client.session("m", ["a"])
        for _ in range(3):
            session.append(torch.ones(1, 4), [1])
        assert client.stats.resends == 1
    assert len(servicer.metadata) == 2


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_stream_that_is_refused_says_why(code: grpc.StatusCode) -> None:
    def refuse(requests: Iterator[pb.StepStreamRequest], context: Any) -> Iterator[Any]:
        context.abort(code, "no")
        yield

    def refuse_step(request: pb.StepRequest, context: Any) -> pb.StepResponse:
        context.abort(code, "no")
        raise AssertionError

    with other_server(servicing(refuse, refuse_step)) as target, MemoryClient(target) as client:
        with pytest.raises((errors.NotAuthenticated, errors.NotAllowed)):
            append(client)


def test_a_stream_that_ends_politely_is_a_broken_one_too() -> None:
    def end(requests: Iterator[pb.StepStreamRequest], context: Any) -> Iterator[Any]:
        next(requests)
        yield from ()

    with other_server(servicing(end)) as target, MemoryClient(target) as client:
        assert append(client).epoch == 7


def test_an_answer_for_which_there_is_no_room_leaves_nobody_waiting(
    server: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("model_client.transport.stream.Assembly.add", Mock(side_effect=MemoryError("no room")))
    with MemoryClient(server.target, timeout_s=20.0) as client:
        client.create_memory("crowded", dim=4, capacity=32, max_sequences=16, dtype=torch.float32)
        for position in range(3):
            assert append(client, memory="crowded").first_position == position  # resent by a unary call, once
        assert client.stats.resends == 1
    assert "answers could not be read" in caplog.text


def test_an_answer_that_nobody_waits_for_is_passed_over() -> None:
    def twice(requests: Iterator[pb.StepStreamRequest], context: Any) -> Iterator[Any]:
        for request in requests:
            for _ in range(2):
                yield pb.StepStreamResponse(call_id=request.call_id, step=answer_to(request.step))

    with other_server(servicing(twice)) as target, MemoryClient(target) as client:
        for _ in range(2):
            append(client)


def test_steps_without_an_answer_are_not_kept_for_ever() -> None:
    def silent(requests: Iterator[pb.StepStreamRequest], context: Any) -> Iterator[Any]:
        for request in requests:
            if not request.step.retrieve.top_k == 1:
                yield pb.StepStreamResponse(call_id=request.call_id, step=answer_to(request.step))

    with other_server(servicing(silent)) as target, MemoryClient(target) as client:
        append(client)
        stream = client._transport._connection._stream  # type: ignore[attr-defined]
        overdue = stream.send(pb.StepRequest(retrieve=pb.RetrieveOptions(top_k=1)).SerializeToString(), -2.0)
        append(client)
        with pytest.raises(errors.Late):
            overdue.result(timeout=10)


def test_a_message_that_is_too_large_is_refused_here(server: Serving) -> None:
    with MemoryClient(server.target) as client:
        with pytest.raises(errors.InvalidRequest, match="fewer rows"):
            append(client, rows=MAX_MESSAGE_BYTES // 16 + 1)
        assert append(client).num_appended == 1


def test_nobody_there() -> None:
    for use_stream in (True, False):
        with MemoryClient("127.0.0.1:1", timeout_s=0.02, use_stream=use_stream) as client:
            with pytest.raises((errors.Unavailable, errors.Late)):
                client.info()
            with pytest.raises((errors.Unavailable, errors.Late)):
                append(client)


def test_a_server_that_comes_back_has_lost_its_rows_and_the_session_goes_on() -> None:
    with serving() as first:
        client = MemoryClient(first.target, timeout_s=20.0)
        client.create_memory("m", dim=4, capacity=8, dtype=torch.float32)
        session = client.session("m", ["a"])
        session.append(torch.ones(3, 4), [3])
        port = first.target.rpartition(":")[2]
        assert client.stats.failures == 0
    with client, serving(Setting(port=int(port))):
        client.create_memory("m", dim=4, capacity=8, dtype=torch.float32)
        assert session.append(torch.ones(2, 4), [2]).sequences[0].first_position == 0
    assert client.stats.lost_epochs == 1


def test_closing_fails_what_is_under_way(server: Serving) -> None:
    def silent(requests: Iterator[pb.StepStreamRequest], context: Any) -> Iterator[Any]:
        next(requests)
        next(requests, None)
        yield from ()

    with other_server(servicing(silent)) as target:
        client = MemoryClient(target, timeout_s=20.0)
        pending = client.session("m", ["a"]).start_step(torch.ones(1, 4), [1], retrieve=Retrieval(1), append=False)
        client.close()
        with pytest.raises(errors.ClientClosed):
            pending.result()
    client = MemoryClient(server.target)
    client.close()
    with pytest.raises(errors.ClientClosed):
        client.info()


def test_closing_fails_unary_calls_under_way() -> None:
    arrived = futures.Future[None]()
    leave = futures.Future[None]()

    def wait(request: pb.StepRequest, context: Any) -> pb.StepResponse:
        arrived.set_result(None)
        leave.result(timeout=20)
        return pb.StepResponse()

    with other_server(servicing(unimplemented, wait)) as target:
        client = MemoryClient(target, timeout_s=20.0, use_stream=False)
        pending = client.session("m", ["a"]).start_step(torch.ones(1, 4), [1], retrieve=Retrieval(1), append=False)
        arrived.result(timeout=20)
        client.close()
        leave.set_result(None)
        with pytest.raises(errors.ClientClosed):
            pending.result()


def test_a_client_ends_with_its_interpreter_without_a_word(server: Serving) -> None:
    program = f"""
        import torch
        from model_client import MemoryClient, Retrieval
        client = MemoryClient("{server.target}")
        session = client.session("m", ["left open"])
        session.step(torch.ones(1, 4), [1], retrieve=Retrieval(1), append=True)
        pending = session.start_step(torch.ones(1, 4), [1], retrieve=Retrieval(1), append=True)
        local = MemoryClient()
        local.create_memory("m", dim=4, capacity=4)
        local.session("m", ["a"]).start_step(torch.ones(1, 4), [1], retrieve=None, append=True)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(program)],
        capture_output=True,
        timeout=150,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_child_process_makes_a_connection_of_its_own(server: Serving) -> None:
    program = f"""
        import multiprocessing, torch
        from model_client import MemoryClient, Retrieval

        client = MemoryClient("{server.target}", timeout_s=20.0)
        session = client.session("m", ["forked"])

        def append():
            return client.session("m", ["forked"]).append(torch.ones(1, 4), [1]).sequences[0].first_position

        if __name__ == "__main__":
            assert append() == 0
            with multiprocessing.get_context("fork").Pool(1) as pool:
                assert pool.apply(append) == 1
                assert append() == 2
                assert pool.apply(append) == 3
            client.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
