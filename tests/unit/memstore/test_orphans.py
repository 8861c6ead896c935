"""What a killed process leaves of memories that it was dropping or making, and what is no such thing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.admission import Admission, CapacityBudget, QueueLimits
from memstore.catalog import FileCatalog, MemoryId
from memstore.device import DeviceWorker
from memstore.errors import Corrupt, MemstoreError, NotReady
from memstore.folder import PASSING
from memstore.registry import Registry
from memstore.seams import SystemDisk
from memstore.turns import SERVER
from memstore.types import Durability, MemorySpec
from tests.fakes import FakeClock, FakeDisk
from tests.lives import batch
from tests.serving import file_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

DATA = Path("/data")
SPEC = MemorySpec(name="m", dim=2, capacity=4, durability=Durability.INTERVAL)
A, B = MemoryId("a", "m"), MemoryId("b", "m")
OF_A = DATA / "memories" / "a"
WAIT_S = 10.0
Files = dict[Path, bytes]


class Watched(FileCatalog):
    """Tells when it is about to change, and when it has; fails where it shall."""

    def __init__(self, disk: FakeDisk) -> None:
        super().__init__(DATA, disk)
        self.before: Callable[[], None] = _nothing
        self.after: Callable[[], None] = _nothing
        self.is_failing = False

    def put(self, memory: MemoryId, text: str) -> None:
        self.before()
        super().put(memory, text)

    def remove(self, memory: MemoryId) -> None:
        self.before()
        if self.is_failing:
            raise NotReady("not now")
        super().remove(memory)
        self.after()


class Life:
    """A server's memories over the files of an earlier one."""

    def __init__(self, files: Files | None = None) -> None:
        self.disk = FakeDisk()
        self.disk.files = dict(files or {})
        self.catalog = Watched(self.disk)
        clock = FakeClock()
        self.worker = DeviceWorker(torch.device("cpu"), Admission(QueueLimits()), clock)
        store = file_store(DATA, self.disk, clock)
        self.registry = Registry(self.catalog, self.worker, CapacityBudget(1 << 20), clock, 10, store)

    def load(self) -> Life:
        """Reads what there is, and removes what is left of others."""
        self.registry.load().result(WAIT_S)
        self.registry._removals.submit(SERVER, _nothing).result(WAIT_S)  # behind what is left of others
        return self

    def make(self, memory: MemoryId) -> None:
        """A durable memory with a row."""
        loaded, _ = self.registry.create(memory, SPEC, False).result(WAIT_S)
        (result,) = self.worker.control(partial(loaded.engine.step, [batch(SPEC, "x", 1, 0)])).result(WAIT_S)
        assert not isinstance(result, MemstoreError)

    def num_rows(self, memory: MemoryId) -> int:
        """Of a memory in service."""
        return self.registry.find(*memory).engine.counts().num_rows

    def files(self, folder: Path = OF_A) -> Files:
        """What lies in a folder."""
        return {path: content for path, content in self.disk.files.items() if folder in path.parents}

    def close(self) -> None:
        """Ends its threads."""
        self.registry.close()
        self.worker.close()
        self.registry.close_files()


@pytest.fixture
def lives() -> Iterator[Callable[..., Life]]:
    """Makes them, loaded, and ends them."""
    made: list[Life] = []

    def begin(files: Files | None = None) -> Life:
        made.append(Life(files))
        return made[-1].load()

    yield begin
    for life in made:
        life.close()


def _killed(life: Life, when: str, change: Callable[[], Future[object]]) -> Files:
    """The files of a process that was killed "before" or "after" the catalogue was changed."""
    left: Files = {}
    setattr(life.catalog, when, lambda: left.update(life.disk.files))
    change().result(WAIT_S)
    assert left
    return left


def test_what_a_kill_left_of_a_memory_that_was_dropped_goes_with_the_next_start(lives: Callable[..., Life]) -> None:
    first = lives()
    first.make(A)
    first.make(B)
    left = _killed(first, "after", lambda: first.registry.drop(A))  # type: ignore[arg-type, return-value]
    assert OF_A / "m" / PASSING in left
    second = lives(left)
    assert not second.files()
    assert second.num_rows(B) == 1
    second.make(A)
    assert second.num_rows(A) == 1


def test_one_that_the_catalogue_still_has_stays(lives: Callable[..., Life]) -> None:
    first = lives()
    first.make(A)
    left = _killed(first, "before", lambda: first.registry.drop(A))  # type: ignore[arg-type, return-value]
    assert OF_A / "m" / PASSING in left
    second = lives(left)
    assert second.num_rows(A) == 1
    assert OF_A / "m" / PASSING not in second.files(), "it stays for good"


def test_what_a_kill_left_of_a_memory_that_was_made_goes_with_the_next_start(lives: Callable[..., Life]) -> None:
    first = lives()
    left = _killed(first, "before", lambda: first.registry.create(A, SPEC, False))  # type: ignore[arg-type, return-value]
    (log,) = (path for path in left if OF_A in path.parents)
    assert not lives(left).files()
    for length in range(len(left[log])):
        assert not lives({**left, log: left[log][:length]}).files(), "killed while it wrote the head"


@pytest.mark.parametrize("is_spoilt", [False, True], ids=["whole", "spoilt"])
def test_what_has_rows_is_left_where_the_catalogue_is_lost(
    lives: Callable[..., Life], caplog: pytest.LogCaptureFixture, is_spoilt: bool
) -> None:
    first = lives()
    first.make(A)
    left = {path: content for path, content in first.disk.files.items() if path != DATA / "catalog.json"}
    if is_spoilt:
        left = {path: content[:-1] + bytes([content[-1] ^ 1]) for path, content in left.items()}
    second = lives(left)
    assert second.files() == {path: content for path, content in left.items() if OF_A in path.parents}
    assert "folder of no memory left as it is" in caplog.text


def test_files_that_are_nobodys_are_in_nobodys_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as what a file manager leaves in every folder."""
    disk, clock = SystemDisk(), FakeClock()
    for folder in ("memories", "memories/a", "spilled", "."):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".DS_Store").write_text("views")
        (tmp_path / folder / "notes").write_text("mine")
    store = file_store(tmp_path, disk, clock)
    (tmp_path / "memories" / "a" / "mine").mkdir()
    (tmp_path / "memories" / "a" / "mine" / "log").write_text("mine")
    store.retire_orphans([])
    assert "left as it is" in caplog.text
    store.remove_rest()
    assert (tmp_path / "memories" / "a" / "notes").read_text() == "mine"
    assert (tmp_path / "memories" / "a" / "mine" / "log").read_text() == "mine"
    assert (tmp_path / "notes").read_text() == "mine"
    store.close()


def test_damage_hides_no_memory_from_those_that_are_known(lives: Callable[..., Life]) -> None:
    first = lives()
    first.make(A)
    spoilt = {path: b"" if path.name.startswith("log-") else content for path, content in first.disk.files.items()}
    second = lives(spoilt)
    with pytest.raises(Corrupt):
        second.num_rows(A)
    assert second.files() == {path: content for path, content in spoilt.items() if OF_A in path.parents}


def test_a_catalogue_that_fails_its_check_leaves_everything(lives: Callable[..., Life]) -> None:
    first = lives()
    first.make(A)
    left = {**first.disk.files, DATA / "catalog.json": b"{}", OF_A / "m" / PASSING: b"passing\n"}
    second = Life(left)
    with pytest.raises(Corrupt):
        second.load()
    second.close()
    assert second.disk.files == left


def test_a_drop_that_the_catalogue_refuses_leaves_no_mark(lives: Callable[..., Life]) -> None:
    life = lives()
    life.make(A)
    before = life.files()
    life.catalog.is_failing = True
    with pytest.raises(NotReady):
        life.registry.drop(A).result(WAIT_S)
    assert life.files() == before
    assert life.num_rows(A) == 1


def test_where_no_mark_can_be_made_a_memory_is_dropped_all_the_same(
    lives: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    life = lives()
    life.make(A)
    replace = life.disk.replace

    def fail(path: Path, content: bytes) -> None:
        if path.name == PASSING:
            raise OSError(28, "No space left on device")
        replace(path, content)

    monkeypatch.setattr(life.disk, "replace", fail)
    life.registry.drop(A).result(WAIT_S)
    assert not life.files()


def _nothing() -> None:
    """Nobody wants to know."""
