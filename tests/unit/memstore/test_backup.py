"""What an operator does without a server: verify a data folder, restore a backup of it."""

from __future__ import annotations

import json
import shutil
import stat
from typing import TYPE_CHECKING, Any

import pytest

from memstore.__main__ import main
from memstore.catalog import FileCatalog
from memstore.seams import SystemDisk
from memstore.v1 import memstore_pb2 as pb
from tests.fakes import FakeClock
from tests.serving import Setting, file_store, serving, spec, step

if TYPE_CHECKING:
    from pathlib import Path


def _setting(data: Path) -> Setting:
    return Setting(catalog=FileCatalog(data, SystemDisk()), store=file_store(data, SystemDisk(), FakeClock()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of a server that was stopped in order, with two durable memories and one that is not."""
    folder = tmp_path / "data"
    with serving(_setting(folder)) as server:
        for name, durability in (("one", pb.DURABILITY_ALWAYS), ("two", pb.DURABILITY_INTERVAL), ("none", 0)):
            server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(name, durability=durability)))
            for seq in range(3):
                server.stub.Step(step(memory=name, seq=seq))
        (one,) = (each for each in server.registry.all() if each.id.name == "one")
        assert one.archive is not None
        assert one.archive.snapshot(one.engine, server.registry.worker.control)
        server.stub.Step(step(memory="one", seq=3))
    return folder


def _verified(capsys: pytest.CaptureFixture[str], folder: Path, code: int = 0) -> dict[str, dict[str, Any]]:
    """What verify says of each memory."""
    assert main(["verify", str(folder), "--json"]) == code
    return {each["name"]: each for each in json.loads(capsys.readouterr().out)}


def test_a_whole_folder_is_ok(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _verified(capsys, data)
    assert {name: each["status"] for name, each in found.items()} == {"one": "ok", "two": "ok"}
    assert found["one"]["snapshot"]
    assert not found["two"]["snapshot"]
    assert main(["verify", str(data)]) == 0
    assert "ok       default/one  snapshot and log" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: _flip(folder / "one" / "snapshot-00000002" / "rows.bin"),
        lambda folder: _flip(folder / "one" / "snapshot-00000002" / "manifest.json"),
        lambda folder: _flip(folder / "one" / "log-00000002"),
        lambda folder: (folder / "one" / "log-00000002").unlink(),
        lambda folder: shutil.rmtree(folder / "one"),
    ],
    ids=["rows", "manifest", "log", "no log", "no folder"],
)
def test_damage_is_named_and_the_rest_is_checked(
    spoil: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(data / "memories" / "default")
    found = _verified(capsys, data, 1)
    assert {name: each["status"] for name, each in found.items()} == {"one": "damaged", "two": "ok"}
    assert found["one"]["problem"]
    assert main(["restore", str(data), str(tmp_path / "new")]) == 1
    assert not (tmp_path / "new").exists()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_torn_end_is_no_damage_and_nothing_is_changed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data / "memories" / "default" / "one"
    (folder / "closed").unlink()
    log = folder / "log-00000002"
    log.write_bytes(log.read_bytes()[:-3])
    before = log.read_bytes()
    found = _verified(capsys, data)
    assert found["one"]["status"] == "torn"
    assert found["one"]["cut_bytes"] > 0
    assert log.read_bytes() == before


def test_a_spoilt_catalogue_and_a_missing_folder_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "catalog.json").write_text("{}")
    assert main(["verify", str(data)]) == 1
    assert "catalog.json: not a catalogue" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "never")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SystemDisk().lock(data / "lock"):
        assert main(["verify", str(data)]) == 1
    assert "a server is using it: stop that, or give a copy" in capsys.readouterr().err


def test_a_folder_without_durable_memories_is_no_silent_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert f"{tmp_path}: no data folder of memstore" in capsys.readouterr().err
    (tmp_path / "lock").touch()
    assert main(["verify", str(tmp_path)]) == 0
    assert "no memory in it has rows on the disk" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["new", "memories/new", "memories/../new"])
def test_a_backup_is_not_restored_into_itself(where: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(data.rglob("*"))
    assert main(["restore", str(data), str(data / where)]) == 1
    assert "lies in the backup" in capsys.readouterr().err
    assert sorted(data.rglob("*")) == before


def test_a_damaged_backup_is_not_restored_and_that_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _flip(next(data.glob("memories/*/*/snapshot-*/rows.bin")))
    assert main(["restore", str(data), str(tmp_path / "new")]) == 1
    assert "nothing was restored" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_restored_backup_has_its_rows_and_new_epochs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup, new = tmp_path / "backup", tmp_path / "new"
    shutil.copytree(data, backup)
    epochs = {}
    with serving(_setting(data)) as server:  # which goes on after the backup
        for name in ("one", "two"):
            epochs[name] = server.stub.Step(step(memory=name, append=False, writer="")).sequences[0].epoch
    assert main(["restore", str(backup), str(new)]) == 0
    assert all(stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600) for path in new.rglob("*"))
    for _ in range(2):
        with serving(_setting(new)) as server:
            for name, rows in (("one", 4), ("two", 3)):
                result = server.stub.Step(step(memory=name, append=False, writer="")).sequences[0]
                assert result.as_of == rows
                assert result.epoch != epochs[name]
    assert main(["restore", str(backup), str(new)]) == 1
    assert "not empty" in capsys.readouterr().err
