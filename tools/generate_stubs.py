"""Compiles proto/ into memstore/v1: messages, typed stubs and the service. `--check` says whether they are stale."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("memstore/v1")
INIT = '"""Generated from proto/memstore/v1 by tools/generate_stubs.py; never edited."""\n'


def generate(into: Path) -> list[Path]:
    """The generated files below `into`, which receives the whole package path."""
    (into / PACKAGE).mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    bundled = Path(grpc_tools.__file__).parent / "_proto"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where protoc-gen-mypy lives
    outputs = [f"--{kind}={into}" for kind in ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")]
    if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{bundled}", *outputs, *sources]):
        raise SystemExit("protoc failed")
    (into / PACKAGE / "__init__.py").write_text(INIT)
    return sorted(path for path in (into / PACKAGE).iterdir() if path.is_file())


def stale(root: Path) -> list[str]:
    """Names of generated files under `root` that differ from what proto/ gives now."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = {path.name: path.read_bytes() for path in generate(Path(scratch))}
    kept = {path.name: path.read_bytes() for path in (root / PACKAGE).iterdir() if path.is_file()}
    return sorted(name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the committed stubs are stale")
    if parser.parse_args().check:
        names = stale(ROOT)
        sys.exit(f"stale: {', '.join(names)}; run make stubs" if names else 0)
    shutil.rmtree(ROOT / PACKAGE, ignore_errors=True)
    for path in generate(ROOT):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
