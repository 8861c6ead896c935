"""Shingles: what they see as the same text, what they do not, and how shares are counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quality
from integration.demo.text import OTHER_PACKAGES, READ_PACKAGES
from integration.training import disjoint
from integration.training.disjoint import measure, read_names, shared_ratio, shingles, split_files, union
from integration.training.packages import canonical

TRAINING = Path(disjoint.__file__).parent
QUALITY = Path(quality.__file__).parent
LINES = [f"value_{n} = call_{n}()" for n in range(20)]


def recorded(folder: Path = TRAINING) -> list[dict[str, Any]]:
    """What corpus.json says of each package of the base model's text, or of that beside another one."""
    rows: list[dict[str, Any]] = json.loads((folder / "corpus.json").read_text())
    return rows


def trained() -> list[dict[str, Any]]:
    """The same of the packages that the adapter was trained on."""
    names = read_names(QUALITY / "trained.txt")
    rows = [row for row in recorded(QUALITY) if row["id"] in names]
    assert len(rows) == len(names) > 30
    assert {row["split"] for row in rows} == {"train"}
    return rows


def text_of(lines: list[str]) -> str:
    """The lines as one file."""
    return "\n".join(lines) + "\n"


def test_blank_lines_and_indentation_do_not_hide_a_copy() -> None:
    """A copy moved into a class and spaced out has the same shingles."""
    moved = "\n\n".join("    " + line for line in LINES)
    assert np.array_equal(shingles(moved), shingles(text_of(LINES)))


def test_short_files_have_no_shingles() -> None:
    """Four lines are too few to prove a copy; five make one shingle."""
    assert shingles(text_of(LINES[:4])).size == 0
    assert shingles(text_of(LINES[:5])).size == 1


def test_order_of_lines_matters() -> None:
    """The same lines the other way round share nothing."""
    assert shared_ratio(shingles(text_of(LINES[::-1])), shingles(text_of(LINES))) == 0.0


def test_share_counts_the_parts_shingles() -> None:
    """Ten of twenty copied lines are 6 of the 16 shingles of the copy."""
    copy = shingles(text_of([*LINES[:10], *(f"own_{n}()" for n in range(10))]))
    assert shared_ratio(copy, shingles(text_of(LINES))) == 6 / 16
    assert shared_ratio(np.empty(0, np.uint64), copy) == 0.0
    assert union([]).size == 0


def test_documents_split_into_the_files_they_were_made_of() -> None:
    """Each `# file:` line opens a file."""
    document = "# file: a.py\nx = 1\n# file: b/c.py\ny = 2\n\nz = 3\n"
    assert list(split_files(document)) == [("a.py", "x = 1\n"), ("b/c.py", "y = 2\n\nz = 3\n")]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of one module, and of a file in every package that the demo reads."""
    (tmp_path / "heapq.py").write_text(text_of(LINES))
    for number, package in enumerate((*READ_PACKAGES, *OTHER_PACKAGES)):
        (tmp_path / package).mkdir()
        (tmp_path / package / "file.py").write_text(text_of([f"own_{number}_{n}" for n in range(14)]))
    return tmp_path


def test_measure_sees_a_vendored_file(library: Path) -> None:
    """One stdlib file of 16 shingles copied into training, of 14 files of 10 beside it."""
    overlap = measure(library, [("package/copy.py", text_of(LINES)), ("heapq.py", "x = 1")], "3.11")
    assert overlap.num_stdlib_files == 15
    assert overlap.stdlib_shingles_in_training_ratio == 16 / (16 + 14 * 10)
    assert overlap.stdlib_files_over_5_percent == 1
    assert overlap.worst_training_file_ratio == 1.0
    assert overlap.modules_in_training == ["heapq"]
    assert overlap.read_text.shingles_in_training_ratio == overlap.other_text.shingles_in_training_ratio == 0


def test_measure_sees_what_a_text_of_the_demo_shares(library: Path) -> None:
    """Half of one file of the text that is read."""
    copied = (library / READ_PACKAGES[1] / "file.py").read_text().splitlines()[:9]
    overlap = measure(library, [("a.py", text_of(copied))], "3.11")
    assert overlap.read_text.num_files == len(READ_PACKAGES)
    assert overlap.read_text.shingles_in_training_ratio == 5 / (len(READ_PACKAGES) * 10)
    assert overlap.read_text.worst_file == f"{READ_PACKAGES[1]}/file.py"
    assert overlap.read_text.worst_file_ratio == 0.5
    assert overlap.other_text.shingles_in_training_ratio == 0


@pytest.mark.parametrize("text", ["base", "adapter"])
def test_the_committed_report_is_of_the_texts_of_the_demo_and_finds_next_to_nothing_of_them(text: str) -> None:
    """The corpora are not in the repository; what was measured on them is."""
    folder, rows = (TRAINING, recorded()) if text == "base" else (QUALITY, trained())
    report = json.loads((folder / "disjoint.json").read_text())
    for part, packages in (("read_text", READ_PACKAGES), ("other_text", OTHER_PACKAGES)):
        assert report[part]["packages"] == list(packages)
        assert report[part]["num_shingles"] > 10_000
        assert report[part]["shingles_in_training_ratio"] < 0.002
    assert report["stdlib_shingles_in_training_ratio"] < 0.001
    assert report["modules_in_training"] == []
    assert report["num_training_files"] == sum(row["num_files"] for row in rows)


def test_no_package_of_the_training_text_is_of_the_standard_library() -> None:
    """By the names of the packages; what the demo reads is of the standard library."""
    names = {canonical(row["id"].partition("==")[0]) for row in recorded()}
    assert len(names) == len(recorded()) > 90
    assert names >= {canonical(row["id"].partition("==")[0]) for row in trained()}
    assert names & {name.lower() for name in sys.stdlib_module_names} == set()
    assert {*READ_PACKAGES, *OTHER_PACKAGES} <= sys.stdlib_module_names
