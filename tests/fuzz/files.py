"""Targets that read files: logs, snapshots, catalogues, adapters, tokens."""

from __future__ import annotations

import hashlib
import json
import zlib
from contextlib import suppress
from pathlib import Path

from integration import MemoryConfig, MemoryWeights, load_adapter, save_adapter
from integration.adapter import CONFIG_FILE, AdapterError
from integration.config import ConfigError as MemoryConfigError
from memstore import changes, log
from memstore.catalog import FILE_NAME, FileCatalog, MemoryId
from memstore.config import ConfigError
from memstore.entries import spec_of, text_of
from memstore.errors import Corrupt, QuotaExceeded
from memstore.journal import read_step
from memstore.log import MAGIC, SegmentReader
from memstore.spill_file import _START as SPILL_START
from memstore.spill_file import MAGIC as SPILL_MAGIC
from memstore.spill_file import SpillFile, content_of
from memstore.tokens import parse_tokens
from tests.fakes import FakeDisk, FakeReadFile
from tests.fuzz.mutating import mutated, mutated_json
from tests.fuzz.target import Target
from tests.lives import FOLDER, SPEC, Life, batch

DATA = Path("/data")


def _bodies() -> tuple[Life, list[bytes]]:
    """The bodies of a log's records of something of everything."""
    life = Life(FakeDisk(), is_new=True)
    life.append("a", 3, 0)
    life.append("a", 0, 1)
    life.append("b", 6, 0, start=True)
    life.memory.fork("a", "c", 2, 0)
    life.memory.reset(["a"], release=False)
    life.memory.reset(["b"], release=True)
    life.memory.renew()
    records = SegmentReader(FakeReadFile(life.disk.files[FOLDER / "log-00000001"])).records(None)
    return life, [bytes(record.body) for record in records if record.kind == log.STEP]


def record() -> Target:
    """A record of a log that has passed its checksum, done behind those before it; and its changes alone."""
    life, bodies = _bodies()

    def run(content: bytes) -> None:
        memory = life.blank()
        for at in range(len(bodies)):
            try:
                for body in (*bodies[:at], content):
                    memory.refill().redo(*read_step(memoryview(body)))
            except Corrupt:
                continue
            memory.step([batch(memory.spec, "new", 1, 0)])
            break
        try:
            changes.encode(changes.decode(memoryview(content)))
        except Corrupt:
            return

    return Target(bodies, run)


def segment() -> Target:
    """A file of a log, whose checksums are those of another content."""
    life, _ = _bodies()
    files = dict(life.disk.files)
    path = FOLDER / "log-00000001"

    def run(content: bytes) -> None:
        reader = SegmentReader(FakeReadFile(content))
        assert sum(len(each.body) for each in reader.records(None)) <= len(content)
        reader.synced_behind()
        life.disk.files = {**files, path: content}
        _starts(life)

    return Target([files[path]], run)


def head() -> Target:
    """What stands in the first record of a log, past its checksum."""
    life, _ = _bodies()
    files = dict(life.disk.files)
    path = FOLDER / "log-00000001"
    rest = files[path].split(MAGIC, 2)[2]
    content = b'{"boot_id":"boot 1","format":1,"identity":"m","is_behind_loss":true}'

    def run(content: bytes) -> None:
        framed = b"".join(bytes(part) for part in log.frame(log.HEAD, 1, 1, [content]))
        life.disk.files = {**files, path: framed + MAGIC + rest}
        _starts(life)

    return Target([content], run, mutated_json)


def manifest() -> Target:
    """A snapshot's manifest, past its checksum."""
    life = Life(FakeDisk(), is_new=True)
    life.append("a", 3, 0)
    life.append("b", 6, 0)
    assert life.snapshot()
    files = dict(life.disk.files)
    path = FOLDER / "snapshot-00000002" / "manifest.json"
    seed = json.dumps(json.loads(files[path])["manifest"], separators=(",", ":"), sort_keys=True).encode()

    def run(content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest().encode()
        life.disk.files = {**files, path: b'{"sha256":"' + digest + b'","manifest":' + content + b"}\n"}
        _starts(life)

    return Target([seed], run, mutated_json)


def closed() -> Target:
    """What says where a log ended."""
    life, _ = _bodies()
    life.archive.close()
    files = dict(life.disk.files)

    def run(content: bytes) -> None:
        life.disk.files = {**files, FOLDER / "closed": content}
        _starts(life)

    return Target([files[FOLDER / "closed"]], run)


def _starts(life: Life) -> None:
    """Starts over the files that are there, and does something, unless they are found to be damaged."""
    try:
        again = life.again()
    except Corrupt:
        return
    with suppress(QuotaExceeded):  # a log that is cut short may have as many sequences as there is room for
        again.append("new", 1, 0)
    again.memory.counts()


def catalogue() -> Target:
    """The file of the catalogue, and each spec in it, past their checksums."""
    text = text_of(SPEC, 1e9)
    disk = FakeDisk()

    def run(content: bytes) -> None:
        for sealed in (content, _resealed(content)):
            disk.files = {DATA / FILE_NAME: sealed}
            try:
                entries = FileCatalog(DATA, disk).load()
                for memory, each in entries.items():
                    spec_of(memory, each)
            except Corrupt:
                continue

    FileCatalog(DATA, disk).put(MemoryId("t", "m"), text)
    FileCatalog(DATA, disk).put(MemoryId("t", "n"), text)
    return Target([disk.files[DATA / FILE_NAME]], run, mutated_json)


def _resealed(content: bytes) -> bytes:
    """A catalogue with the checksum that fits it, where one can be made."""
    try:
        document = json.loads(content)
        entries = sorted(document["memories"])
        document["sha256"] = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        return json.dumps(document).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return content


def catalogue_entry() -> Target:
    """One spec as a catalogue in Redis has it."""

    def run(content: bytes) -> None:
        try:
            spec_of(MemoryId("t", "m"), content.decode(errors="replace"))
        except Corrupt:
            return

    return Target([text_of(SPEC, 1e9).encode()], run, mutated_json)


def adapter(name: str, folder: Path) -> Target:
    """A file of an adapter folder."""
    config = MemoryConfig(
        memory="m",
        retrieval_layer=0,
        attention_layers=(1,),
        hidden_size=8,
        dim=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    save_adapter(folder, config, MemoryWeights(config))
    seed = (folder / name).read_bytes()

    def run(content: bytes) -> None:
        (folder / name).write_bytes(content)
        try:
            load_adapter(folder)
        except (AdapterError, MemoryConfigError):
            return

    return Target([seed], run, mutated_json if name == CONFIG_FILE else mutated)


def tokens() -> Target:
    """The file of tokens."""

    def run(content: bytes) -> None:
        try:
            parse_tokens(content.decode(errors="replace"))
        except ConfigError:
            return

    return Target([b"# ours\nsha256:" + b"0f" * 32 + b" red\n"], run)


def spilled() -> Target:
    """The head of a file of a spilled sequence, past its checksum, and what is read by it."""
    life = Life(FakeDisk(), is_new=True)
    for seq in range(2):
        life.append("a", 2, seq)
    sequence = life.memory._table["a"]
    start, text, *rest = content_of("a", sequence, [[memoryview(bytes(64))]])
    size = len(start)

    def run(content: bytes) -> None:
        head = SPILL_START.pack(SPILL_MAGIC, len(content), zlib.crc32(content))
        try:
            file = SpillFile(FakeReadFile(b"".join((head, content, *map(bytes, rest)))), "a")
            file.writers()
            file.read_into([[memoryview(bytearray(64))]])
        except Corrupt:
            return

    assert size == SPILL_START.size
    return Target([bytes(text)], run, mutated_json)
