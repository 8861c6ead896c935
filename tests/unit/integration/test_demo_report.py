"""What a run of the demo leaves: numbers, table, picture and page."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from integration.demo.figure import draw
from integration.demo.page import NUM_EXAMPLES, write_page
from integration.demo.reading import BINS, Reading, ReadMap
from integration.demo.report import Readings, Report, machine
from integration.trace import ReadTrace

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 4 * BINS


def _report(**changes: Any) -> Report:
    report = Report(
        text="a text",
        other_text="another",
        tokens=TOKENS,
        bytes=1500,
        perplexity_memory=9.0,
        perplexity_none=10.0,
        perplexity_other_document=10.5,
        bits_per_byte_memory=0.8,
        bits_per_byte_none=0.9,
        tokens_per_s=1234.0,
        tokens_per_s_none=2345.0,
        retrieval_share=0.125,
        transport="grpc-stream",
        steps_without_memory=0,
        memory={"capacity": 300},
        model_parameters=1,
        memory_parameters=1,
        lora_parameters=1,
        machine=machine("cpu"),
    )
    return dataclasses.replace(report, **changes)


@pytest.fixture
def readings() -> Readings:
    """Losses of 2 nats; with its own memory token 301 costs half, and token 40, which read nothing, less still."""
    none, memory = (np.full(TOKENS - 1, 2.0, dtype=np.float32) for _ in range(2))
    memory[300], memory[39] = 1.0, 0.1
    other = Reading(losses=none, seconds=1.0)
    return Readings(none=other, memory=Reading(losses=memory, seconds=2.0, retrieval_seconds=0.5), other=other)


@pytest.fixture
def read_map() -> ReadMap:
    """Tokens 290 to 309 read position 17."""
    found = ReadMap(TOKENS)
    found.add(290, ReadTrace(counts=(20,), positions=torch.full((20, 1), 17), mass=torch.full((20, 1), 0.5)))
    return found


def test_the_report_holds_every_field_and_the_gain(tmp_path: Path) -> None:
    report = _report()
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.keys() == {field.name for field in dataclasses.fields(Report)} | {"perplexity_gain"}
    assert written["perplexity_gain"] == pytest.approx(0.1)
    assert written == report.as_dict()


def test_the_table_tells_changes_and_speed() -> None:
    table = "\n".join(_report().lines())
    for told in ("9.000    -10.0%", "10.500     +5.0%", "0.8000", "1,234 tokens/s", "2,345 without", "12.5%"):
        assert told in table
    assert "spoiled" not in table


def test_the_table_warns_of_segments_without_their_memory() -> None:
    assert "3 segments were read without" in _report(steps_without_memory=3).lines()[-1]


def test_the_machine_is_told_without_its_name() -> None:
    told = machine("cpu")
    assert re.search(r", \d+ cores, Python 3\.\d+\.\d+, torch \d", told)
    assert len(platform.node()) < 3 or platform.node() not in told


def test_the_picture_is_a_png_of_its_size(readings: Readings, read_map: ReadMap, tmp_path: Path) -> None:
    draw(readings, read_map, 300, tmp_path / "report.png")
    content = (tmp_path / "report.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1560, 624)


def test_a_picture_of_a_text_that_read_nothing_can_be_drawn(readings: Readings, tmp_path: Path) -> None:
    draw(readings, ReadMap(TOKENS), 10 * TOKENS, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def _page(report: Report, readings: Readings, read_map: ReadMap, folder: Path) -> dict[str, Any]:
    """What the script of the written page is given."""
    (folder / "picture.png").write_bytes(b"picture")
    words = [f"</script>{number} " for number in range(TOKENS)]
    write_page(
        report,
        readings,
        read_map,
        lambda begin, end: "".join(words[begin:end]),
        folder / "picture.png",
        folder / "report.html",
    )
    text = (folder / "report.html").read_text()
    assert text.count("</script>") == 1  # what was read cannot end the script
    assert "/*PAGE*/" not in text
    content: dict[str, Any] = json.loads(text.partition("const page = ")[2].partition(";\n")[0])
    return content


def test_the_page_shows_the_map_and_the_token_that_gained(
    readings: Readings, read_map: ReadMap, tmp_path: Path
) -> None:
    page = _page(_report(), readings, read_map, tmp_path)
    assert np.array(page["map"]).shape == (BINS, BINS)
    assert np.array(page["map"])[290 * BINS // TOKENS, 17 * BINS // TOKENS] == 1.0
    assert len(page["snippets"]) == BINS
    assert page["snippets"][1].startswith("</script>4 ")
    best = page["examples"][0]
    assert (best["token"], best["position"], best["share"]) == (301, 17, "50%")
    assert (best["none"], best["memory"]) == ("2.00", "1.00")
    assert best["reading"][1] == "</script>301 "
    assert best["source"][0].endswith("</script>16 ")
    assert 1 <= len(page["examples"]) <= NUM_EXAMPLES


def test_examples_are_apart_and_only_of_tokens_that_read(readings: Readings, read_map: ReadMap, tmp_path: Path) -> None:
    tokens = [example["token"] - 1 for example in _page(_report(), readings, read_map, tmp_path)["examples"]]
    assert all(290 <= token < 310 for token in tokens)
    assert min(np.diff(sorted(tokens))) > TOKENS // BINS


def test_a_page_of_a_text_that_read_nothing_has_no_examples(readings: Readings, tmp_path: Path) -> None:
    page = _page(_report(), readings, ReadMap(TOKENS), tmp_path)
    assert page["examples"] == []
    assert np.array(page["map"]).max() == 0
