"""Listening: one server to an address, sockets for their owner only, TLS with and without client certificates."""

from __future__ import annotations

import asyncio
import shutil
import stat
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from memstore.arrival import credentials_of
from memstore.auth import authenticator_of
from memstore.config import Config, ConfigError
from memstore.errors import NotReady
from memstore.listen import SERVER_OPTIONS, _unwatched, add_reflection, address_lock, bind
from memstore.seams import SystemClock, SystemDisk
from memstore.server import StopSignals

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

ASK = health_pb2.HealthCheckRequest()


@asynccontextmanager
async def listening(
    config: Config, follow: Callable[[str, Callable[[], bool]], None] = _unwatched
) -> AsyncIterator[str]:
    """A server that answers health checks at the configured address, which is given."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    address = bind(server, config, SystemClock(), follow)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


async def answered(channel: grpc.aio.Channel) -> bool:
    """True where a health check is answered."""
    async with channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(ASK, timeout=10)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            return False
        return True


def test_a_free_port_is_found_and_told() -> None:
    async def run() -> None:
        async with listening(Config(port=0)) as address:
            assert int(address.removeprefix("127.0.0.1:")) > 0
            assert await answered(grpc.aio.insecure_channel(address))

    asyncio.run(run())


def test_a_port_has_one_server() -> None:
    async def run() -> None:
        async with listening(Config(port=0)) as address:
            taken = Config(port=int(address.rpartition(":")[2]))
            with pytest.raises(ConfigError, match="--port"):
                bind(grpc.aio.server(options=SERVER_OPTIONS), taken, SystemClock())

    asyncio.run(run())


def test_ipv6_addresses_are_put_in_brackets() -> None:
    async def run() -> None:
        async with listening(Config(host="::1", port=0)) as address:
            assert address.startswith("[::1]:")
            assert await answered(grpc.aio.insecure_channel(address))

    asyncio.run(run())


def test_a_socket_is_its_owners_only_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.touch()  # a server that was killed leaves one
    config = Config(unix_socket=path)

    async def run() -> None:
        async with listening(config) as address:
            assert address == f"unix://{path}"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert await answered(grpc.aio.insecure_channel(address))

    with address_lock(config, SystemDisk()):
        with pytest.raises(NotReady, match="another server"), address_lock(config, SystemDisk()):
            raise AssertionError("two servers at one socket")
        asyncio.run(run())
    assert not path.exists()


def test_a_socket_in_no_folder_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        with pytest.raises(ConfigError, match="--unix-socket"):
            bind(grpc.aio.server(), Config(unix_socket=tmp_path / "none" / "s"), SystemClock())

    asyncio.run(run())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a self-signed certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certify(folder)
    return folder


def certify(folder: Path) -> None:
    """Makes cert.pem and key.pem anew."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)


def test_tls_lets_in_who_trusts_the_certificate(certificates: Path) -> None:
    root = (certificates / "cert.pem").read_bytes()
    config = Config(host="localhost", port=0, tls_cert=certificates / "cert.pem", tls_key=certificates / "key.pem")

    async def run() -> None:
        async with listening(config) as address:
            trusting = grpc.ssl_channel_credentials(root)
            assert await answered(grpc.aio.secure_channel(address, trusting))
            assert not await answered(grpc.aio.insecure_channel(address))
            assert not await answered(grpc.aio.secure_channel(address, grpc.ssl_channel_credentials()))

    asyncio.run(run())


def test_mutual_tls_wants_a_certificate_of_the_client(certificates: Path) -> None:
    cert, key = certificates / "cert.pem", certificates / "key.pem"
    config = Config(host="localhost", port=0, tls_cert=cert, tls_key=key, tls_client_ca=cert)

    async def run() -> None:
        async with listening(config) as address:
            own = grpc.ssl_channel_credentials(cert.read_bytes(), key.read_bytes(), cert.read_bytes())
            assert await answered(grpc.aio.secure_channel(address, own))
            bare = grpc.ssl_channel_credentials(cert.read_bytes())
            assert not await answered(grpc.aio.secure_channel(address, bare))

    asyncio.run(run())


def test_certificates_are_exchanged_without_a_restart(tmp_path: Path) -> None:
    """Of the server and of who may sign clients; a pair that is half written leaves what was known."""
    certify(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    config = Config(host="localhost", port=0, tls_cert=cert, tls_key=key, tls_client_ca=cert)
    old, old_key = cert.read_bytes(), key.read_bytes()
    followed: dict[str, Callable[[], bool]] = {}

    def channel(address: str, pem: bytes, pem_key: bytes) -> grpc.aio.Channel:
        own = grpc.ssl_channel_credentials(pem, pem_key, pem)
        return grpc.aio.secure_channel(address, own, options=[("grpc.use_local_subchannel_pool", 1)])

    async def run() -> None:
        async with listening(config, followed.__setitem__) as address:
            standing = channel(address, old, old_key)
            ask = health_pb2_grpc.HealthStub(standing).Check
            await ask(ASK, timeout=10)
            certify(tmp_path)
            new, new_key = cert.read_bytes(), key.read_bytes()
            cert.write_bytes(old)
            assert followed["certificates"]()
            assert await answered(channel(address, old, old_key))
            assert not await answered(channel(address, new, new_key))
            cert.write_bytes(new)
            assert await answered(channel(address, new, new_key))
            assert not followed["certificates"]()
            assert not await answered(channel(address, old, old_key))
            await ask(ASK, timeout=10)  # a connection that stands goes on
            await standing.close()

    asyncio.run(run())


def test_certificates_that_could_not_be_read_are_read_again_though_they_have_not_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there were no descriptors left for a while: an authority that was taken out must not stay good."""
    certify(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    config = Config(host="localhost", port=0, tls_cert=cert, tls_key=key, tls_client_ca=cert)
    old, old_key = cert.read_bytes(), key.read_bytes()
    followed: dict[str, Callable[[], bool]] = {}

    def fail(_: Path) -> bytes:
        raise OSError(24, "Too many open files")

    async def run() -> None:
        async with listening(config, followed.__setitem__) as address:
            certify(tmp_path)
            with monkeypatch.context() as patch:
                patch.setattr("pathlib.Path.read_bytes", fail)
                assert followed["certificates"]()
            assert not followed["certificates"]()
            known = grpc.ssl_channel_credentials(cert.read_bytes(), old_key, old)
            assert not await answered(grpc.aio.secure_channel(address, known))

    asyncio.run(run())


def test_a_certificate_of_another_key_stops_the_start(tmp_path: Path, certificates: Path) -> None:
    certify(tmp_path)
    config = Config(port=0, tls_cert=tmp_path / "cert.pem", tls_key=certificates / "key.pem")

    async def run() -> None:
        with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
            bind(grpc.aio.server(), config, SystemClock())

    asyncio.run(run())


def test_the_name_in_a_certificate_is_the_tenant(certificates: Path) -> None:
    cert, key = certificates / "cert.pem", certificates / "key.pem"
    config = Config(host="localhost", port=0, tls_cert=cert, tls_key=key, tls_client_ca=cert, tls_tenant="cn")
    seen: list[str] = []

    class Asked(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
        """Remembers who asked."""

        async def Check(
            self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
        ) -> health_pb2.HealthCheckResponse:
            made = authenticator_of(config, SystemClock())
            seen.append(made.identify(credentials_of({}, context, made)).tenant)
            return health_pb2.HealthCheckResponse()

    async def run() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(Asked(), server)
        address = bind(server, config, SystemClock())
        await server.start()
        own = grpc.ssl_channel_credentials(cert.read_bytes(), key.read_bytes(), cert.read_bytes())
        assert await answered(grpc.aio.secure_channel(address, own))
        await server.stop(0)

    asyncio.run(run())
    assert seen == ["localhost"]


@pytest.mark.parametrize(
    ("config", "is_on"),
    [
        (Config(), True),
        (Config(host="0.0.0.0"), False),  # noqa: S104
        (Config(host="0.0.0.0", reflection="on"), True),  # noqa: S104
        (Config(reflection="off"), False),
        (Config(host="0.0.0.0", unix_socket=Path("s")), True),  # noqa: S104
    ],
)
def test_reflection_is_for_loopback_unless_asked_for(config: Config, is_on: bool) -> None:
    class Recorder:
        """Remembers whether anything was added."""

        def __init__(self) -> None:
            self.added = False

        def add_generic_rpc_handlers(self, handlers: object) -> None:
            self.added = True

        def add_registered_method_handlers(self, *_: object) -> None:
            self.added = True

    recorder = Recorder()
    add_reflection(recorder, config, ("memstore.v1.MemoryService",))  # type: ignore[arg-type]
    assert recorder.added is is_on


def test_the_second_signal_is_not_the_first() -> None:
    async def run() -> None:
        stop = StopSignals()
        stop.arrived()
        await stop.wait()
        again = asyncio.ensure_future(stop.wait_again())
        await asyncio.wait((again,), timeout=0)
        assert not again.done()
        stop.arrived()
        await again

    asyncio.run(run())
