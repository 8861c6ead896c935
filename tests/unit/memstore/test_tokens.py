"""TokenFile: what its lines say, and tokens that are made."""

from __future__ import annotations

import json
import math
import stat
from typing import TYPE_CHECKING

import pytest

from memstore.__main__ import main
from memstore.access import ALL, Identity, Scope
from memstore.config import ConfigError
from memstore.tokens import PREFIX, Quota, hash_of, line_of, new_token, parse_tokens
from tests.calling import hashed

if TYPE_CHECKING:
    from pathlib import Path

GOOD = hashed("good", "red")
LAST = "the last line has no end"


def test_fields_say_how_far_a_token_reaches() -> None:
    text = "\n".join(
        (
            "# of the red team",
            hashed("all", "red"),
            hashed("reader", "red", "scopes=read"),
            hashed("passing", "blue", "expires=2030-01-31T12:00:00+01:00", "scopes=read,write"),
            "quota red bytes=8G sequences=4096 calls_per_s=200.5 leases=12 spilled_bytes=1T",
            "",
        )
    )
    file = parse_tokens(text)
    assert file.identities == {
        hash_of("all"): Identity(tenant="red", scopes=ALL, expires_at=math.inf),
        hash_of("reader"): Identity(tenant="red", scopes=frozenset({Scope.READ})),
        hash_of("passing"): Identity(
            tenant="blue", scopes=frozenset({Scope.READ, Scope.WRITE}), expires_at=1896087600.0
        ),
    }
    red = Quota(reserved_bytes=8 << 30, sequences=4096, calls_per_s=200.5, leases=12, spilled_bytes=1 << 40)
    assert file.quotas == {"red": red}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no token"),
        ("# nothing\n", "no token"),
        ("quota red bytes=1G\n", "no token"),
        ("old red\n", "line 1: not `sha256"),
        ("sha256:abc red\n", "line 1: not `sha256"),
        (hashed("old", ""), "line 1: not `sha256"),
        (hashed("old", "two", "words"), "line 1: words: none of scopes=, expires="),
        (hashed("old", "../red"), "line 1: not `sha256"),
        (f"{GOOD}\n\n{GOOD}", "line 3: the same token"),
        (hashed("old", "red", "scopes=root"), "'root' is none of admin, read, write"),
        (hashed("old", "red", "scopes="), "'' is none of"),
        (hashed("old", "red", "scopes=read", "scopes=write"), "scopes= stands twice"),
        (hashed("old", "red", "expires=soon"), "soon is not a time"),
        (hashed("old", "red", "bytes=1G"), "none of scopes="),
        (f"{GOOD}\nquota red calls_per_s=-1", "line 2: calls_per_s=-1 is outside"),
        (f"{GOOD}\nquota red calls_per_s=nan", "line 2: calls_per_s=nan is outside"),
        (f"{GOOD}\nquota red sequences=-1", "line 2: sequences=-1 is below 0"),
        (f"{GOOD}\nquota red leases=-1", "line 2: leases=-1 is below 0"),
        (f"{GOOD}\nquota red bytes=much", "line 2: not a size"),
        (f"{GOOD}\nquota red\nquota red", "line 3: tenant red has a quota already"),
        (f"{GOOD}\nquota", "line 2: not `sha256"),
    ],
)
def test_a_token_file_that_cannot_be_right_names_its_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_tokens(text if text.endswith("\n") else f"{text}\n")
    assert str(caught.value).startswith("--token-file: ")
    assert hashed("old", "").split()[0] not in str(caught.value)


def test_a_file_that_is_cut_short_never_reaches_further_than_the_whole() -> None:
    """A line that has lost its end may have lost its scopes, or the time at which it expires."""
    rows = (
        hashed("reader", "red", "scopes=read", "expires=2030-01-31T12:00:00Z"),
        hashed("writer", "blue", "scopes=read,write"),
        "quota red bytes=8G sequences=4096",
        hashed("admin", "blue"),
    )
    text = "\n".join((*rows, ""))
    whole = parse_tokens(text)
    lengths = {len("\n".join((*rows[:number], ""))) for number in range(1, len(rows) + 1)}
    for length in range(len(text)):
        if length in lengths:
            file = parse_tokens(text[:length])
            assert file.identities.items() <= whole.identities.items()
            assert file.quotas.items() <= whole.quotas.items()
        else:
            with pytest.raises(ConfigError, match=LAST if length else "no token"):
                parse_tokens(text[:length])


def test_tokens_are_long_random_and_recognisable() -> None:
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(token.startswith(PREFIX) and len(token) == len(PREFIX) + 43 for token in made)


def test_the_line_of_a_token_lets_it_in_and_does_not_show_it() -> None:
    token = new_token()
    identity = Identity(tenant="red", scopes=frozenset({Scope.READ}), expires_at=1896087600.0)
    line = line_of(token, identity)
    assert token not in line
    assert token.removeprefix(PREFIX) not in line
    assert parse_tokens(f"{line}\n").identities == {hash_of(token): identity}


def test_the_command_adds_a_line_and_prints_the_token_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokens"
    assert main(["token", "red", "--scopes", "read", "--expires", "90d", "--add", str(path)]) == 0
    first = capsys.readouterr().out.strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(path.read_text().rstrip("\n"))  # an editor may leave it so
    assert main(["token", "blue", "--json", "--add", str(path)]) == 0
    second = json.loads(capsys.readouterr().out)
    identities = parse_tokens(path.read_text()).identities
    assert identities[hash_of(first)].scopes == {Scope.READ}
    assert identities[hash_of(first)].expires_at < math.inf
    assert identities[hash_of(second["token"])] == Identity(tenant="blue")
    assert (second["scopes"], second["expires_at"]) == (["admin", "read", "write"], None)
    assert first not in path.read_text()


def test_the_command_shows_token_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "red"]) == 0
    token, line = (row.split(maxsplit=1)[1] for row in capsys.readouterr().out.splitlines())
    assert parse_tokens(f"{line}\n").identities == {hash_of(token): Identity(tenant="red")}


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["no/tenant"], 2, "tenant 'no/tenant'"),
        (["red", "--scopes", "root"], 2, "'root' is none of"),
        (["red", "--expires", "soon"], 2, "soon is not a time"),
        (["red", "--expires", "99999999999d"], 2, "memstore token: "),
        (["red", "--expires", "2001-01-01"], 2, "is past"),
        (["red", "--expires", "9999-12-31T23:59:59-23:59"], 2, "--expires=9999-12-31T23:59:59-23:59"),
        (["red", "--add", "/none/tokens"], 1, "/none/tokens: No such file"),
    ],
)
def test_a_token_that_cannot_be_made_says_why(
    arguments: list[str], code: int, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["token", *arguments]) == code
    printed = capsys.readouterr()
    assert problem in printed.err
    assert printed.out == ""
