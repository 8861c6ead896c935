"""The generated stubs in memstore/v1 are those of proto/."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
generate_stubs = pytest.importorskip("generate_stubs", reason="grpcio-tools is not installed", exc_type=ImportError)
PACKAGE = generate_stubs.PACKAGE


def test_stubs_are_what_the_contract_gives() -> None:
    assert generate_stubs.stale(ROOT) == [], "run make stubs"


def test_a_stale_stub_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    stub = tmp_path / PACKAGE / "memstore_pb2.pyi"
    stub.write_text(stub.read_text() + "# changed by hand\n")
    (tmp_path / PACKAGE / "memstore_pb2_grpc.py").unlink()
    assert generate_stubs.stale(tmp_path) == ["memstore_pb2.pyi", "memstore_pb2_grpc.py"]
