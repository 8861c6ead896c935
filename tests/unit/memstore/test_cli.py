"""The command line: what people and scripts see, and exit codes."""

from __future__ import annotations

import json
import logging
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from memstore import __main__
from memstore.__main__ import main
from memstore.service import VERSION
from memstore.v1 import memstore_pb2 as pb
from tests.calling import hashed, tokens
from tests.serving import Setting, serving, spec, step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.serving import Serving


@pytest.fixture(autouse=True)
def _own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `serve` sets up for its process ends with the test."""
    logger = logging.getLogger("memstore")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(logger, name, getattr(logger, name))


@pytest.fixture(autouse=True)
def _target(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSTORE_TARGET", server.target)
    server.stub.Step(step(("a", "b"), rows=2))


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints; on standard error where it fails."""
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert (printed.err == "") == (code == 0)
    return printed.err if code else printed.out


def test_ls_shows_a_line_a_memory(capsys: pytest.CaptureFixture[str]) -> None:
    head, row = said(capsys, "ls").splitlines()
    assert head.split() == ["NAME", "DIM", "CAPACITY", "SEQUENCES", "LAYERS", "ROWS", "RESERVED", "DEVICE"]
    assert row.split()[:6] == ["notes", "4", "8", "2/4", "1", "4"]
    assert row.endswith("cpu")
    assert len(said(capsys, "ls", "other").splitlines()) == 1


def test_ls_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    (memory,) = json.loads(said(capsys, "ls", "no", "--json"))
    assert memory["spec"]["name"] == "notes"
    assert memory["spec"]["capacity"] == "8"  # 64 bits are text in JSON
    assert memory["status"]["num_sequences"] == 2
    assert json.loads(said(capsys, "ls", "none", "--json")) == []


def test_describe(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dict(row.split(None, 1) for row in said(capsys, "describe", "notes").splitlines())
    assert (lines["name"], lines["dim"], lines["num_rows"]) == ("notes", "4", "4")
    assert (lines["dtype"], lines["evicted_rows"]) == ("DATA_TYPE_FP32", "0")
    assert json.loads(said(capsys, "describe", "notes", "--json"))["status"]["device"] == "cpu"
    assert "NOT_FOUND: no memory 'none'" in said(capsys, "describe", "none", code=1)


def test_describe_shows_the_generations_of_a_large_index(capsys: pytest.CaptureFixture[str], server: Serving) -> None:
    pytest.importorskip("faiss")
    large = spec("large", index=pb.INDEX_KIND_FAISS_CAGRA)
    server.stub.CreateMemory(pb.CreateMemoryRequest(spec=large))
    lines = dict(row.split(None, 1) for row in said(capsys, "describe", "large").splitlines())
    assert (lines["index_settings.generation_rows"], lines["index_settings.graph_degree"]) == ("16384", "64")
    assert [lines[f"index.{name}"] for name in ("num_generations", "tail_rows", "builds_under_way")] == ["0"] * 3


def test_drop_wants_to_be_told_twice(capsys: pytest.CaptureFixture[str], server: Serving) -> None:
    assert "--yes" in said(capsys, "drop", "notes", code=1)
    assert server.registry.is_loaded("default", "notes")
    assert said(capsys, "drop", "notes", "--yes") == "dropped notes\n"
    assert not server.registry.is_loaded("default", "notes")
    server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
    assert json.loads(said(capsys, "drop", "notes", "--yes", "--json")) == {"dropped": "notes"}


def test_healthcheck_is_an_exit_code(capsys: pytest.CaptureFixture[str], server: Serving) -> None:
    assert said(capsys, "healthcheck") == "SERVING\n"
    assert json.loads(said(capsys, "healthcheck", "--service", "memory/notes", "--json"))["status"] == "SERVING"
    assert "NOT_FOUND" in said(capsys, "healthcheck", "--service", "memory/none", code=1)
    server.registry.drain()
    assert main(["healthcheck"]) == 1
    assert capsys.readouterr().out == "NOT_SERVING\n"


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "ls", "--target", "127.0.0.1:1", "--timeout", "5", code=1)
    assert text.startswith("memstore ls: 127.0.0.1:1: UNAVAILABLE")
    assert "memstore serve" in text
    assert "--target" in text


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_a_time_that_cannot_pass_is_wrong_usage(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["ls", f"--timeout={seconds}"])
    assert "--timeout: a number of seconds above 0" in capsys.readouterr().err


def test_the_version_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"memstore {VERSION}\n"


def test_a_token_is_read_from_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    path.write_text("secret\n")
    with serving(Setting(authenticator=tokens(hashed("secret", "red")))) as guarded:
        monkeypatch.setenv("MEMSTORE_TARGET", guarded.target)
        assert "NOT_AUTHENTICATED" in said(capsys, "ls", code=1)
        assert said(capsys, "ls", "--token-file", str(path)).startswith("NAME")
        monkeypatch.setenv("MEMSTORE_TOKEN_FILE", str(tmp_path / "hashes"))  # the server's, not read here
        assert "NOT_AUTHENTICATED" in said(capsys, "ls", code=1)
        monkeypatch.setenv("MEMSTORE_CLIENT_TOKEN_FILE", str(path))
        assert said(capsys, "ls").startswith("NAME")
    assert "No such file" in said(capsys, "ls", "--token-file", str(tmp_path / "none"), code=1)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a b", b"one\ntwo\n", "\u00fc".encode(), b"a\0"], ids=repr)
def test_what_cannot_be_a_token_is_said_and_not_sent(
    content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    assert f"{path}: not a token" in said(capsys, "ls", "--token-file", str(path), code=1)


@pytest.mark.parametrize("arguments", [["describe", "a\udcff"], ["healthcheck", "--service", "\udcff"]])
def test_bytes_that_are_no_text_are_wrong_usage(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "udcff' is not text" in said(capsys, *arguments, code=2)


def test_the_server_says_the_version_of_the_package() -> None:
    package = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert package["project"]["version"] == VERSION


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["ls", "--color"],
        ["describe"],
        ["serve", "--port"],
    ],
)
def test_wrong_usage_is_2(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: memstore" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "http"], "--port=http"),
        (["--host", "0.0.0.0"], "--insecure-bind"),  # noqa: S104
        (["--token-file", "/none"], "/none"),
        (["--device", "cuda:99"], "--device=cuda:99"),
        (["--catalog", "redis://host:port"], "--catalog: Port could not be cast"),
        (["--tls-cert", "/none", "--tls-key", "/none", "--metrics-port", "0"], "/none"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    arguments: Sequence[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMSTORE_TARGET")
    text = said(capsys, "serve", "--port", "0", "--metrics-port", "0", "--catalog", "none", *arguments, code=2)
    assert text.startswith("memstore serve: ")
    assert named in text


@pytest.mark.parametrize("flag", ["--data", "--ready-file", "--unix-socket"])
def test_a_folder_that_cannot_be_made_is_named(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MEMSTORE_TARGET")
    (tmp_path / "file").touch()
    beyond = str(tmp_path / "file" / "folder" / "name")
    free = ("--port", "0", "--metrics-port", "0", "--device", "cpu", "--data", str(tmp_path / "data"))
    text = said(capsys, "serve", *free, flag, beyond, code=1)
    assert text.startswith(f"memstore serve: {tmp_path}/file")
    assert text.endswith(": Not a directory\n")


def test_an_unknown_variable_stops_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMSTORE_PROT", "1")
    assert "MEMSTORE_PROT" in said(capsys, "serve", code=2)


def test_other_packages_add_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("shout", f"{__name__}:shout", __main__.GROUP)
    monkeypatch.setattr(__main__, "entry_points", lambda group: [point] if group == __main__.GROUP else [])
    assert main(["shout", "--loud", "a"]) == 3
    assert heard == ["--loud", "a"]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "shout" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fly"])
    assert "'shout'" in capsys.readouterr().err, "who mistypes a command is told of all of them"


heard: list[str] = []


def shout(arguments: Sequence[str]) -> int:
    """A command of another package."""
    heard.extend(arguments)
    return 3
