"""Auth: who is let in, and where a server may listen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memstore.access import ALL, Scope
from memstore.auth import (
    DEFAULT_TENANT,
    FOLLOW_S,
    Certificates,
    Credentials,
    Open,
    authenticator_of,
    check_bind,
)
from memstore.config import Config, ConfigError
from memstore.errors import NotAuthenticated
from memstore.tokens import PREFIX_BYTES, hash_of, parse_tokens
from tests.calling import hashed, tokens
from tests.fakes import FakeClock

KNOWN = tokens("# ours", "", hashed("old", "red"), f"  {hashed('new', 'red')}  ", hashed("other", "blue"))


def carrying(token: str) -> Credentials:
    """The credentials of a call with a token."""
    return Credentials.of({"authorization": f"Bearer {token}"})


@pytest.mark.parametrize(("token", "tenant"), [("old", "red"), ("new", "red"), ("other", "blue")])
def test_a_known_token_has_its_tenant(token: str, tenant: str) -> None:
    assert KNOWN.identify(carrying(token)).tenant == tenant
    assert KNOWN.identify(Credentials.of({"authorization": f"bearer {token}"})).tenant == tenant


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic old"},
        {"authorization": "old"},
        {"authorization": "Bearer old "},
        {"authorization": f"Bearer {hashed('old', 'red')}"},
        {"x-token": "old"},
    ],
    ids=str,
)
def test_anything_else_is_refused_without_saying_why(metadata: dict[str, str]) -> None:
    with pytest.raises(NotAuthenticated) as caught:
        KNOWN.identify(Credentials.of(metadata))
    assert str(caught.value) == "a valid token is needed: authorization: Bearer TOKEN"


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """What is compared in constant time."""
    made: list[tuple[bytes, bytes]] = []

    def compare(known: bytes, given: bytes) -> bool:
        made.append((known, given))
        return known == given

    monkeypatch.setattr("memstore.tokens.hmac.compare_digest", compare)
    return made


def test_one_token_of_many_is_compared_whole_and_in_constant_time(compared: list[tuple[bytes, bytes]]) -> None:
    """However many there are: a thousand tokens cost what one does."""
    many = tokens(*(hashed(str(number), f"t{number}") for number in range(1000)))
    for number in (0, 500, 999):
        compared.clear()
        assert many.identify(carrying(str(number))).tenant == f"t{number}"
        assert compared == [(hash_of(str(number)), hash_of(str(number)))]
    compared.clear()
    with pytest.raises(NotAuthenticated):
        many.identify(carrying("wrong"))
    assert len(compared) <= 1


def test_what_leads_to_a_token_does_not_let_in(compared: list[tuple[bytes, bytes]]) -> None:
    """Hashes that begin alike are told apart, and one that is of no token is none."""
    alike = [bytes(PREFIX_BYTES) + bytes([end]) * (32 - PREFIX_BYTES) for end in range(4)]
    lines = [f"sha256:{digest.hex()} t{number}\n" for number, digest in enumerate(alike[:3])]
    file = parse_tokens("".join(lines))
    for number, digest in enumerate(alike[:3]):
        found = file.find(digest)
        assert found is not None
        assert found.tenant == f"t{number}"
    compared.clear()
    assert file.find(alike[3]) is None
    assert {known for known, _ in compared} == set(alike[:3])
    for cut in (b"", alike[0][:PREFIX_BYTES], alike[0][:-1], alike[0] + b"0"):
        assert file.find(cut) is None


def test_a_token_is_good_until_it_expires() -> None:
    clock = FakeClock()
    known = tokens(hashed("t", "red", "expires=1970-01-01T00:16:50Z"), hashed("u", "red"), clock=clock)
    clock.now = 1009.9
    assert known.identify(carrying("t")).tenant == "red"
    clock.now = 1010.0
    with pytest.raises(NotAuthenticated, match="expired"):
        known.identify(carrying("t"))
    assert known.identify(carrying("u")).scopes == ALL


def test_tokens_come_from_the_configured_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{hashed('new', 'red', 'scopes=read')}\n")
    identity = authenticator_of(Config(token_file=path), FakeClock()).identify(carrying("new"))
    assert (identity.tenant, identity.scopes) == ("red", {Scope.READ})
    with pytest.raises(ConfigError, match="No such file"):
        authenticator_of(Config(token_file=tmp_path / "none"), FakeClock())
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not text"):
        authenticator_of(Config(token_file=path), FakeClock())


def test_tokens_are_rotated_without_a_restart(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens", FakeClock()
    path.write_text(f"{hashed('old', 'red')}\n")
    known = authenticator_of(Config(token_file=path), clock)

    def goes(token: str) -> bool:
        clock.advance(FOLLOW_S)
        try:
            return known.identify(carrying(token)).tenant == "red"
        except NotAuthenticated:
            return False

    assert (goes("old"), goes("new")) == (True, False)
    path.write_text(f"{hashed('old', 'red')}\n{hashed('new', 'red')}\n")
    assert (goes("old"), goes("new")) == (True, True)
    path.write_text(f"{hashed('new', 'red')}\n")
    assert (goes("old"), goes("new")) == (False, True)


def test_a_file_that_is_spoilt_later_changes_nothing_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "tokens", FakeClock()
    path.write_text(f"{hashed('good', 'red')}\n")
    known = authenticator_of(Config(token_file=path), clock)
    for spoil in (lambda: path.write_text("nonsense here\n"), path.unlink):
        caplog.clear()
        spoil()
        for _ in range(3):
            clock.advance(FOLLOW_S)
            assert known.identify(carrying("good")).tenant == "red"
        assert [record.getMessage() for record in caplog.records] == ["changed file not taken, what was known stays"]
    path.write_text(f"{hashed('next', 'red')}\n")
    clock.advance(FOLLOW_S)
    assert known.identify(carrying("next")).tenant == "red"


def test_a_file_that_could_not_be_read_is_read_again_though_it_has_not_changed_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there were no descriptors left for a while: a token that was taken away must not stay good."""
    path, clock = tmp_path / "tokens", FakeClock()
    path.write_text(f"{hashed('good', 'red')}\n{hashed('lost', 'red')}\n")
    known = authenticator_of(Config(token_file=path), clock)
    path.write_text(f"{hashed('good', 'red')}\n")

    def fail(_: Path) -> str:
        raise OSError(24, "Too many open files")

    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_text", fail)
        for _ in range(3):
            clock.advance(FOLLOW_S)
            assert known.identify(carrying("lost")).tenant == "red"
    clock.advance(FOLLOW_S)
    with pytest.raises(NotAuthenticated):
        known.identify(carrying("lost"))
    assert not known.is_stale
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["changed file not taken, what was known stays", "changed file taken"]


def test_a_bug_in_reading_a_changed_file_is_said_and_nobody_is_turned_away_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock = tmp_path / "tokens", FakeClock()
    path.write_text(f"{hashed('good', 'red')}\n")
    known = authenticator_of(Config(token_file=path), clock)
    path.write_text(f"{hashed('next', 'red')}\n")
    with monkeypatch.context() as patch:
        patch.setattr("memstore.auth.parse_tokens", lambda _: [][0])
        for _ in range(3):
            clock.advance(FOLLOW_S)
            assert known.identify(carrying("good")).tenant == "red"
        assert known.is_stale
    (record,) = caplog.records
    assert record.exc_info is not None, "with its traceback, and once"
    clock.advance(FOLLOW_S)
    assert known.identify(carrying("next")).tenant == "red"
    assert not known.is_stale


def test_a_file_that_is_read_half_written_is_not_taken_and_says_so(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens", FakeClock()
    whole = f"{hashed('other', 'red')}\n{hashed('passing', 'red', 'scopes=read', 'expires=2030-01-31T12:00:00Z')}\n"
    path.write_text(f"{hashed('other', 'red')}\n")
    known = authenticator_of(Config(token_file=path), clock)
    assert not known.is_stale
    path.write_text(whole[: whole.index(" scopes")])  # by now good for ever, for everything
    clock.advance(FOLLOW_S)
    with pytest.raises(NotAuthenticated):
        known.identify(carrying("passing"))
    assert known.identify(carrying("other")).tenant == "red"
    assert known.is_stale
    path.write_text(whole)
    clock.advance(FOLLOW_S)
    assert not known.is_stale  # asking is looking
    assert known.identify(carrying("passing")).scopes == {Scope.READ}


def test_a_file_of_the_same_size_and_time_is_told_by_its_inode(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens", FakeClock()
    path.write_text(f"{hashed('one', 'red')}\n")
    known, before = authenticator_of(Config(token_file=path), clock), path.stat()
    (tmp_path / "next").write_text(f"{hashed('two', 'red')}\n")
    os.utime(tmp_path / "next", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "next").replace(path)
    clock.advance(FOLLOW_S)
    assert known.identify(carrying("two")).tenant == "red"


def test_without_a_file_everyone_is_one_tenant() -> None:
    made = authenticator_of(Config(), FakeClock())
    assert isinstance(made, Open)
    assert made.identify(Credentials()).tenant == DEFAULT_TENANT
    assert not made.is_stale


def test_a_certificate_names_its_tenant() -> None:
    config = Config(tls_cert=Path("c"), tls_key=Path("k"), tls_client_ca=Path("a"), tls_tenant="cn")
    made = authenticator_of(config, FakeClock())
    assert isinstance(made, Certificates)
    assert made.identify(Credentials(common_names=("red",))).tenant == "red"
    assert not made.is_stale
    for names in ((), ("red", "blue"), ("../red",), ("",)):
        with pytest.raises(NotAuthenticated):
            made.identify(Credentials(common_names=names))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    check_bind(Config(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", "localhost.example.org", ""])  # noqa: S104
def test_a_wider_bind_needs_tls_or_tokens_or_the_flag_that_it_names(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure-bind"):
        check_bind(Config(host=host))
    for allowed in (
        Config(host=host, insecure_bind=True),
        Config(host=host, token_file=Path("tokens")),
        Config(host=host, tls_cert=Path("cert"), tls_key=Path("key")),
        Config(host=host, unix_socket=Path("socket")),
    ):
        check_bind(allowed)
