"""Bugs are still where they can be planted, and some of them are: the tests that should notice do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.seeded.seeding import BUGS, ROOT, BadBug, Bug, load

if TYPE_CHECKING:
    from pathlib import Path

LEAST = 12
HARMLESS = """
[[bug]]
name = "harmless"
what = "none at all"
edits = [{ file = "memstore/ring.py", right = "position % capacity\\n", wrong = "(position % capacity)\\n" }]
tests = ["tests/unit/memstore/test_ring.py"]
quick = true
"""


def test_there_are_enough_bugs() -> None:
    assert len(load()) >= LEAST
    assert sum(bug.is_quick for bug in load()) >= LEAST


@pytest.mark.parametrize("bug", load(), ids=lambda bug: bug.name)
def test_a_bug_can_be_planted_and_names_tests_that_exist(bug: Bug) -> None:
    for path, content in bug.planted(ROOT).items():
        assert content != path.read_text()
        ast.parse(content)
    for test in bug.tests:
        file, _, name = test.partition("::")
        names = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert not name or name in names, f"{file} has no {name}"


def test_a_bug_whose_place_has_changed_is_named() -> None:
    bug = load()[0]
    edit = type(bug.edits[0])(file=bug.edits[0].file, right="what is nowhere", wrong="")
    with pytest.raises(BadBug, match="what is nowhere"):
        Bug(bug.name, bug.what, (edit,), bug.tests, is_quick=False).planted(ROOT)


@pytest.mark.timeout(600)
def test_bugs_are_caught_and_what_is_none_is_not(tmp_path: Path) -> None:
    bugs = tmp_path / "bugs.toml"
    bugs.write_text(BUGS.read_text() + HARMLESS)
    command = [sys.executable, "-m", "tests.seeded.seeding", "--bugs", str(bugs)]
    command += ["dedupe-without-writer", "harmless"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert re.findall(r"^([\w-]+) +(caught|SURVIVED)$", done.stdout, re.MULTILINE) == [
        ("dedupe-without-writer", "caught"),
        ("harmless", "SURVIVED"),
    ], done.stdout + done.stderr
    assert done.returncode == 1
