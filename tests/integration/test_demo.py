"""memstore demo, as it is typed: a real model, the weights that ship, a server process of its own."""

from __future__ import annotations

import base64
import heapq
import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from integration.adapter import load_adapter
from integration.demo import command
from memstore.__main__ import main
from tests.serving import serving

TOKENS = 1536
PNG = b"\x89PNG\r\n\x1a\n"
PROMISED = {
    "tokens",
    "perplexity_memory",
    "perplexity_none",
    "perplexity_other_document",
    "bits_per_byte_memory",
    "bits_per_byte_none",
    "tokens_per_s",
    "retrieval_share",
    "transport",
}


def _source(seed: int, statements: int) -> str:
    """Assignments whose names nobody can guess who has not read them before."""
    chosen = random.Random(seed)
    names = ["".join(chosen.choices("bcdfghklmnprstvz", k=7)) for _ in range(2 * statements)]
    return "".join(f"{left} = {right}(1)\n" for left, right in zip(names[::2], names[1::2], strict=True))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.py says the same things over and over, each time after longer than a segment; other.py is other code."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.py").write_text(_source(1, 60) * 3)
    (folder / "other.py").write_text(Path(heapq.__file__).read_text())
    return folder


@pytest.fixture(scope="module")
def run(texts: Path) -> Path:
    """The folder of the report of one run."""
    out = texts / "new" / "report"
    arguments = ["--text", str(texts / "text.py"), "--other-text", str(texts / "other.py")]
    assert main(["demo", *arguments, "--tokens", str(TOKENS), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    """report.json of that run."""
    loaded: dict[str, Any] = json.loads((run / "report.json").read_text())
    return loaded


def test_the_report_has_what_it_promises(report: dict[str, Any]) -> None:
    assert report.keys() >= PROMISED
    assert report["tokens"] == TOKENS
    assert report["transport"] == ("cuda" if torch.cuda.is_available() else "shm")
    assert report["steps_without_memory"] == 0
    assert 0 < report["retrieval_share"] < 1
    assert report["tokens_per_s"] > 0
    assert report["text"] == "text.py"


def test_its_own_memory_helps_and_another_documents_does_not(report: dict[str, Any]) -> None:
    assert report["perplexity_memory"] < 0.9 * report["perplexity_none"]
    assert report["perplexity_other_document"] > 0.98 * report["perplexity_none"]
    assert report["bits_per_byte_memory"] < report["bits_per_byte_none"]
    assert report["perplexity_gain"] == pytest.approx(1 - report["perplexity_memory"] / report["perplexity_none"])


def test_the_weights_that_ship_are_small_and_those_of_their_report() -> None:
    files = [file for file in command.WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 16_000_000
    adapter = load_adapter(command.WEIGHTS / "adapter")
    told = json.loads((command.WEIGHTS / "adapter" / "report.json").read_text())
    config, weights = adapter.config, adapter.weights
    assert (config.retrieval_layer, config.top_k, config.segment_length) == (
        told["layer"],
        told["top_k"],
        told["segment"],
    )
    assert sum(each.numel() for each in weights.parameters()) + adapter.lora_parameters == told["trained_parameters"]


class Addresses(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str | None] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_picture_and_page_need_nothing_else(run: Path) -> None:
    assert sorted(file.name for file in run.iterdir()) == ["report.html", "report.json", "report.png"]
    picture, page = (run / "report.png").read_bytes(), (run / "report.html").read_text()
    assert picture.startswith(PNG)
    assert base64.b64encode(picture).decode() in page
    assert Addresses(page).found == []
    for fetching in ("://", "url(", "@import", "fetch(", "import "):
        assert fetching not in page


def test_the_page_shows_passages_and_where_they_were_read(run: Path) -> None:
    page = (run / "report.html").read_text()
    content = json.loads(page.partition("const page = ")[2].partition(";\n")[0])
    assert content["examples"]
    for example in content["examples"]:
        assert 0 <= example["position"] < example["token"]
        assert example["reading"][1] == example["source"][1] or float(example["memory"]) < float(example["none"])


def test_a_server_that_runs_is_used_and_left_as_it_was(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        arguments = ["--text", str(texts / "text.py"), "--other-text", str(texts / "other.py"), "--tokens", "1024"]
        arguments += ["--target", server.target, "--out", str(texts / "second"), "--json", "--capacity", "700"]
        assert main(["demo", *arguments]) == 0
        assert main(["ls", "--target", server.target, "--json"]) == 0
    report, listed = capsys.readouterr().out.splitlines()
    assert json.loads(report)["memory"]["capacity"] == 700
    assert json.loads(listed) == []


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.py", None, "there is no such file or folder"),
        ("empty.py", b"", "holds no text"),
        ("blank.py", b" \n\n", "holds no text"),
        ("short.py", b"x = 1\n", "tokens, at least 1024 are needed"),
        ("binary", b"\x00\x01" * 5000, "holds no text"),
        ("folder/image.png", b"\x89PNG\0" * 1000, "holds no text"),
    ],
)
@pytest.mark.parametrize("option", ["--text", "--other-text"])
def test_texts_that_cannot_be_read_are_named(
    option: str,
    name: str,
    content: bytes | None,
    complaint: str,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    given = tmp_path / name.partition("/")[0]
    both = {"--text": texts / "text.py", "--other-text": texts / "other.py", option: given}
    words = [str(word) for pair in both.items() for word in pair]
    assert main(["demo", *words, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("memstore demo: ")
    assert given.name in said
    assert complaint in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--tokens", "10"], "--tokens: at least 1024"),
        (["--tokens", "many"], "--tokens: invalid int value"),
        (["--capacity", "0"], "--capacity: at least 1"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used"),
        (["--texts", "x"], "unrecognized arguments: --texts"),
    ],
)
def test_arguments_that_make_no_sense_are_named(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *words])
    assert complaint in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "CALL_S", 0.2)
    words = ["--text", str(texts / "text.py"), "--other-text", str(texts / "other.py"), "--out", str(tmp_path)]
    assert main(["demo", *words, "--target", f"unix://{tmp_path}/nothing"]) == 1
    assert f"memstore demo: --target=unix://{tmp_path}/nothing: " in capsys.readouterr().err.splitlines()[-1]
