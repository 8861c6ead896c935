"""Auth: who is let in, and where a server may listen."""

from __future__ import annotations

from pathlib import Path

import pytest

from memstore.auth import DEFAULT_TENANT, Open, authenticator_of, check_bind, parse_tokens
from memstore.config import Config, ConfigError
from memstore.errors import NotAuthenticated
from tests.calling import hashed

TOKENS = parse_tokens(f"# ours\n\n{hashed('old', 'red')}\n  {hashed('new', 'red')}  \n{hashed('other', 'blue')}\n")


@pytest.mark.parametrize(("token", "tenant"), [("old", "red"), ("new", "red"), ("other", "blue")])
def test_a_known_token_has_its_tenant(token: str, tenant: str) -> None:
    assert TOKENS.tenant({"authorization": f"Bearer {token}"}) == tenant
    assert TOKENS.tenant({"authorization": f"bearer {token}"}) == tenant


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
        TOKENS.tenant(metadata)
    assert str(caught.value) == "a valid token is needed: authorization: Bearer TOKEN"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "old red\n",
        "sha256:abc red\n",
        hashed("old", ""),
        hashed("old", "two words"),
        hashed("old", "../red"),
    ],
    ids=["empty", "comments", "a bare token", "a short hash", "no tenant", "two words", "a path"],
)
def test_a_token_file_that_cannot_be_right_stops_the_start(text: str) -> None:
    with pytest.raises(ConfigError, match="--token-file"):
        parse_tokens(text)


def test_tokens_come_from_the_configured_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(hashed("new", "red"))
    assert authenticator_of(Config(token_file=path)).tenant({"authorization": "Bearer new"}) == "red"
    with pytest.raises(ConfigError, match="No such file"):
        authenticator_of(Config(token_file=tmp_path / "none"))


def test_without_a_file_everyone_is_one_tenant() -> None:
    assert isinstance(authenticator_of(Config()), Open)
    assert authenticator_of(Config()).tenant({}) == DEFAULT_TENANT


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
