"""Backup: the commands that look at a data folder without a server: verify, and restore."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from memstore.catalog import FILE_NAME, FileCatalog, MemoryId
from memstore.errors import Corrupt, MemstoreError, NotReady
from memstore.folder import MEMORIES, SPILLED, MemoryFolder, folders, path_of
from memstore.recovery import Recovery
from memstore.seams import FILE_MODE, FOLDER_MODE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from memstore.seams import Disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What the files of one memory are like. status: "ok", "torn" (an end that a start would cut), or "damaged"."""

    tenant: str
    name: str
    status: str
    problem: str = ""
    snapshot: bool = False
    log_bytes: int = 0
    cut_bytes: int = 0


def run(options: argparse.Namespace, disk: Disk) -> int:
    """Runs one of the commands; its exit code. Raises MemstoreError and OSError."""
    source: Path = options.folder if options.command == "verify" else options.backup
    if not source.is_dir():
        raise Corrupt(f"{source}: there is no such folder")
    with ExitStack() as stack:
        if (source / "lock").exists():
            _enter_lock(stack, source, disk)
        elif not any((source / name).exists() for name in (FILE_NAME, MEMORIES)):
            raise Corrupt(f"{source}: no data folder of memstore: it has no {FILE_NAME}, no lock and no {MEMORIES}/")
        findings = verify(source, disk)
        _show(findings, options.json)
        if any(finding.status == "damaged" for finding in findings):
            if options.command == "restore":
                raise Corrupt(f"{source}: damaged, and nothing was restored; take another backup")
            return 1
        if options.command == "restore":
            restore(source, options.folder, disk)
    return 0


def _enter_lock(stack: ExitStack, source: Path, disk: Disk) -> None:
    try:
        stack.enter_context(disk.lock(source / "lock"))
    except NotReady as error:
        raise NotReady(f"{source}: a server is using it: stop that, or give a copy of the folder") from error


def verify(data: Path, disk: Disk) -> list[Finding]:
    """Checks the catalogue, and every memory that has files or should have. Raises Corrupt for the catalogue."""
    texts = FileCatalog(data, disk).load()
    found = {MemoryId(unquote(path.parent.name), unquote(path.name)) for path in folders(data, disk)}
    has_catalog = disk.read(data / FILE_NAME) is not None
    durable = {memory for memory, text in texts.items() if _is_durable(text)}
    return [
        _examined(data, memory, texts.get(memory) if has_catalog else "", disk) for memory in sorted(found | durable)
    ]


def restore(backup: Path, data: Path, disk: Disk) -> None:
    """Copies a backup to a new data folder, whose sequences will begin new epochs. Raises Corrupt and OSError.

    What is copied takes its place when it is whole, marked and on the disk.
    """
    if data.resolve().is_relative_to(backup.resolve()):
        raise Corrupt(f"{data}: lies in the backup; a backup is restored to a folder of its own")
    if data.exists() and any(data.iterdir()):
        raise Corrupt(f"{data}: not empty; a backup is restored to a folder of its own")
    partial = data.with_name(f".{data.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(backup, partial, ignore=shutil.ignore_patterns("lock", SPILLED, f".{SPILLED}.*"))
    for path in (partial, *partial.rglob("*")):
        path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)
    for folder in folders(partial, disk):
        MemoryFolder(folder, disk).mark_restored()
    os.sync()
    disk.rename(partial, data)


def _examined(data: Path, memory: MemoryId, text: str | None, disk: Disk) -> Finding:
    """One memory. text: its entry in the catalogue; None where it has none, "" where there is no catalogue."""
    folder = MemoryFolder(path_of(data, *memory), disk)
    if text is None:
        problem = "the catalogue does not have it: the rest of one that was dropped"
        return Finding(tenant=memory.tenant, name=memory.name, status="ok", problem=problem)
    identity = f"{memory.tenant}/{text}" if text else ""
    try:
        found = Recovery(folder, identity, lambda done, total: None).check()
    except (MemstoreError, OSError) as error:
        return Finding(tenant=memory.tenant, name=memory.name, status="damaged", problem=str(error))
    return Finding(
        tenant=memory.tenant,
        name=memory.name,
        status="torn" if found.cut_bytes else "ok",
        snapshot=found.first_segment > 1,
        log_bytes=found.log_bytes,
        cut_bytes=found.cut_bytes,
    )


def _is_durable(text: str) -> bool:
    """Whether a text of the catalogue is that of a memory with files; one that is no spec has none."""
    try:
        spec: dict[str, Any] = json.loads(text)["spec"]
        return spec.get("durability") in ("DURABILITY_INTERVAL", "DURABILITY_ALWAYS")
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _show(findings: Sequence[Finding], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
        return
    if not findings:
        sys.stdout.write("no memory in it has rows on the disk\n")
    for each in findings:
        what = "snapshot and log" if each.snapshot else "log"
        rest = each.problem or f"{what} of {each.log_bytes} bytes, torn end of {each.cut_bytes} bytes"
        sys.stdout.write(f"{each.status:<8} {each.tenant}/{each.name}  {rest}\n")
