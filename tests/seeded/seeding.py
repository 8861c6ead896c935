"""Bugs that are planted into a copy of the tree, one at a time, for the tests that should notice to be run on it.

`python -m tests.seeded.seeding [NAME ...]` plants those of bugs.toml and says what came of each; the exit code is 1
where one was not caught. Tests run in forks of one process that has imported torch and the like, but nothing of this
tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
BUGS = Path(__file__).with_name("bugs.toml")
PACKAGES = ("memstore", "model_client", "integration", "tests")
FILES = ("pyproject.toml",)
LIMIT_S = 300.0
"""Tests of one bug that take longer hang, which CI would notice too."""
ALL_LIMIT_S = 3600.0
"""The same of the tests of all bugs, which are run once without any; on a busy machine they take a good part of it."""
TEST_LIMIT_S = 20
NOT_RUN = 70
"""Exit code of a fork that could not run any test."""


class BadBug(Exception):
    """A bug that cannot be planted; the text says why."""


class Outcome(Enum):
    """What the tests said."""

    CAUGHT = "caught"
    HUNG = "caught: the tests hang"
    CRASHED = "caught: the tests crash"
    SURVIVED = "SURVIVED"
    BROKEN = "BROKEN: the tests could not be run"

    @property
    def is_caught(self) -> bool:
        """True where CI would have failed because of the bug."""
        return self in (Outcome.CAUGHT, Outcome.HUNG, Outcome.CRASHED)


@dataclass(frozen=True, slots=True)
class Edit:
    """Text that occurs once in a file, and what stands there instead."""

    file: str
    right: str
    wrong: str

    def applied(self, content: str) -> str:
        """The file's content with the bug. Raises BadBug."""
        count = content.count(self.right)
        if count != 1:
            raise BadBug(f"{self.file} has {self.right!r} {count} times, not once")
        return content.replace(self.right, self.wrong)


@dataclass(frozen=True, slots=True)
class Bug:
    """One bug. tests: files, or tests of them, that should notice, from the root of the tree."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    is_quick: bool

    @classmethod
    def of(cls, table: dict[str, object]) -> Bug:
        """A bug as bugs.toml has it. Raises BadBug."""
        match table:
            case {"name": str(name), "what": str(what), "edits": [*edits], "tests": [*tests]} if edits and tests:
                made = tuple(Edit(**edit) for edit in edits)
                return cls(name, what, made, tuple(map(str, tests)), bool(table.get("quick", False)))
        raise BadBug(f"{table.get('name')}: name, what, edits and tests are needed")

    def planted(self, tree: Path) -> dict[Path, str]:
        """The files that it changes, and their new content. Raises BadBug where it does not fit."""
        contents: dict[Path, str] = {}
        for edit in self.edits:
            path = tree / edit.file
            contents[path] = edit.applied(contents.get(path) or path.read_text(encoding="utf-8"))
        return contents


def load(path: Path = BUGS) -> list[Bug]:
    """The bugs of a file. Raises BadBug."""
    with path.open("rb") as file:
        bugs = [Bug.of(table) for table in tomllib.load(file)["bug"]]
    if len({bug.name for bug in bugs}) < len(bugs):
        raise BadBug("two bugs have one name")
    return bugs


class Garden:
    """A copy of the tree in which bugs are planted, for the length of a block."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Garden]:
        """The copy, which is removed at the end."""
        tree = Path(tempfile.mkdtemp(prefix="memstore-seeded-"))
        try:
            for package in PACKAGES:
                # what is compiled goes along: it belongs to the sources' content and time of change
                shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("weights"))
            for name in FILES:
                shutil.copy2(ROOT / name, tree / name)
            yield cls(tree)
        finally:
            shutil.rmtree(tree, ignore_errors=True)

    def outcome(self, bug: Bug) -> tuple[Outcome, str]:
        """Plants a bug, runs its tests, and takes it out again; what they said, and their words."""
        contents = bug.planted(self.tree)
        before = {path: path.read_text(encoding="utf-8") for path in contents}
        try:
            for path, content in contents.items():
                _write(path, content)
            return self.run(bug.tests)
        finally:
            for path, content in before.items():
                _write(path, content)

    def run(self, tests: Sequence[str], limit_s: float = LIMIT_S) -> tuple[Outcome, str]:
        """Runs tests of the copy in a fork of this process, which is killed after so many seconds."""
        words = self.tree / "words"
        words.touch()
        child = os.fork()
        if child == 0:
            try:
                os._exit(_run_tests(self.tree, tests, words))
            finally:  # nothing of the parent's is undone here
                traceback.print_exc()
                os._exit(NOT_RUN)
        code = _waited_for(child, limit_s)
        text = words.read_text(encoding="utf-8", errors="replace")
        if code is None or code < 0:
            return Outcome.HUNG if code is None else Outcome.CRASHED, text
        return {0: Outcome.SURVIVED, 1: Outcome.CAUGHT}.get(code, Outcome.BROKEN), text


def _write(path: Path, content: str) -> None:
    """Replaces a source file, whose compiled form may be of the same second and length."""
    path.write_text(content, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def _waited_for(child: int, limit_s: float) -> int | None:
    """The exit code of a child; None where it had to be killed."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run_tests(tree: Path, tests: Sequence[str], words: Path) -> int:
    """Runs tests in this process, which is a fork; the exit code."""
    os.setpgid(0, 0)  # servers that the tests have started end with it
    os.chdir(tree)
    target = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for number in (1, 2):
        os.dup2(target, number)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(tree)
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]
    import pytest

    import memstore

    assert Path(str(memstore.__file__)).is_relative_to(tree), memstore.__file__
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--timeout", str(TEST_LIMIT_S), *tests])
    sys.stdout.flush()
    return int(code)


def _warm() -> None:
    """Imports once what every fork needs, and nothing of this tree: that is what the forks are to differ in."""
    import google.protobuf.json_format
    import grpc
    import numba
    import pytest
    import torch

    del google, grpc, numba, pytest, torch


def outcomes(bugs: Sequence[Bug]) -> Iterator[tuple[Bug, Outcome, str]]:
    """Each bug, what the tests said, and their words. Raises BadBug where they fail without any bug, too."""
    _warm()
    with Garden.open() as garden:
        outcome, words = garden.run(sorted({test for bug in bugs for test in bug.tests}), ALL_LIMIT_S)
        if outcome is not Outcome.SURVIVED:
            raise BadBug(f"without any bug the tests fail:\n{words}")
        for bug in bugs:
            yield bug, *garden.outcome(bug)


def main(arguments: Sequence[str]) -> int:
    """Plants bugs and says what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="bugs to plant; all of them without one")
    parser.add_argument("--quick", action="store_true", help="those only whose tests take a second")
    parser.add_argument("--bugs", type=Path, default=BUGS, help="the file that they stand in")
    options = parser.parse_args(arguments)
    bugs = [bug for bug in load(options.bugs) if bug.name in (options.names or [bug.name])]
    bugs = [bug for bug in bugs if bug.is_quick or not options.quick]
    num_caught = 0
    for bug, outcome, words in outcomes(bugs):
        num_caught += outcome.is_caught
        _say(f"{bug.name:<50} {outcome.value}")
        if not outcome.is_caught:
            _say(f"    {bug.what}\n{words}")
    _say(f"{num_caught} of {len(bugs)} caught")
    return int(num_caught < len(bugs))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
