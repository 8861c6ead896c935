"""Imports go downwards only, and foreign libraries stay where they belong."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each module of memstore may import those that stand before it.
ORDER = """
    v1 types errors futures config seams logs
    heap garbage descriptors
    ring window places codes region slab control lease search host gpu index sequence lent
    retrieval known appending row_bytes reply_bytes spill_file filed tiers still arrivals spill changes
    seating lifecycle lender planner log journal ledger refill repeated memory
    folder snapshot salvage recovery archive orphans
    admission capacity catalog store pace turns errands jobs joining standing device plane replies
    wire status access followed tokens auth quotas gate
    entries rooms removals registry snapshotter expirer metrics service
    embedded mapped lending listen arrival outcomes talk lobby door grpc_front health
    server console issuing backup __main__
""".split()
PACKAGES = ("memstore", "model_client", "integration")
# The one lazy import of an upper package: the client's in-process transport runs the server's own code.
IN_PROCESS = {
    ("model_client/transport/process.py", "memstore.embedded"),
    ("model_client/transport/process.py", "memstore.plane"),
    ("model_client/transport/mapped.py", "memstore.mapped"),
    ("model_client/transport/switching.py", "memstore.plane"),
}
FOREIGN = {
    "grpc": {
        "memstore/status.py",
        "memstore/listen.py",
        "memstore/arrival.py",
        "memstore/outcomes.py",
        "memstore/lobby.py",
        "memstore/door.py",
        "memstore/grpc_front.py",
        "memstore/health.py",
        "memstore/server.py",
        "memstore/console.py",
    },
    "redis": {"memstore/catalog.py"},
    "faiss": {f"memstore/index/{name}.py" for name in ("faiss_flat", "host_parts")},
    "numba": {
        "memstore/host/compiling.py",
        "memstore/host/dots.py",
        "memstore/host/likeness.py",
        "memstore/host/lowering.py",
        "memstore/host/tiles.py",
    },
    "prometheus_client": {"memstore/metrics.py"},
    "triton": {
        "memstore/gpu/launcher.py",
        *(
            f"memstore/gpu/kernels/{name}.py"
            for name in ("coded", "graphs", "lists", "parts", "reply", "rows", "scan", "select")
        ),
    },
}
GRPC_OF_CLIENT = "model_client/transport/"


def sources() -> list[str]:
    """Every source file of the three packages but the generated ones, relative to the repository."""
    paths = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in paths if not path.startswith("memstore/v1/"))


@cache
def imports(path: str) -> list[tuple[str, bool]]:
    """Full name of each thing that a file imports, and whether importing the file leaves it out."""
    tree = ast.parse((ROOT / path).read_text())
    lazy = {id(node) for part in ast.walk(tree) if _is_left_out(part) for node in ast.walk(part)}
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [(f"{node.module}.{alias.name}", id(node) in lazy) for alias in node.names]
    return found


def _is_left_out(part: ast.AST) -> bool:
    """True for a function, and for what only a type checker reads."""
    if isinstance(part, ast.If):
        return isinstance(part.test, ast.Name) and part.test.id == "TYPE_CHECKING"
    return isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))


def noun(name: str) -> str:
    """The module or package right below memstore that a dotted name or a path lies in."""
    return name.removesuffix(".py").replace("/", ".").split(".")[1]


def test_every_module_of_the_server_has_its_place_in_the_order() -> None:
    nouns = {noun(path) for path in sources() if path.startswith("memstore/")} - {"__init__"}
    assert nouns == set(ORDER) - {"v1"}


@pytest.mark.parametrize(
    "path", [path for path in sources() if path.startswith("memstore/") and "/__init__" not in path]
)
def test_the_server_imports_downwards(path: str) -> None:
    place = ORDER.index(noun(path))
    for name, _ in imports(path):
        package = name.split(".")[0]
        assert package not in ("model_client", "integration"), f"{path} imports {name}"
        if package == "memstore":
            assert ORDER.index(noun(name)) < place or noun(name) == noun(path), f"{path} imports {name}"


@pytest.mark.parametrize("path", [path for path in sources() if path.startswith("model_client/")])
def test_the_client_knows_the_contract_only(path: str) -> None:
    for name, is_lazy in imports(path):
        package = name.split(".")[0]
        assert package != "integration", f"{path} imports {name}"
        if package == "memstore" and not name.startswith("memstore.v1"):
            assert is_lazy, f"{path} imports {name} at once"
            assert (path, ".".join(name.split(".")[:2])) in IN_PROCESS, f"{path} imports {name}"


@pytest.mark.parametrize("path", [path for path in sources() if path.startswith("integration/")])
def test_the_integration_knows_the_client_only(path: str) -> None:
    for name, is_lazy in imports(path):
        assert name.split(".")[0] != "memstore", f"{path} imports {name}"
        assert is_lazy or not name.startswith("peft"), f"{path} imports {name} at once"


@pytest.mark.parametrize("library", FOREIGN)
def test_foreign_libraries_stay_in_their_files(library: str) -> None:
    users = {path for path in sources() if any(name.split(".")[0] == library for name, _ in imports(path))}
    if library == "grpc":
        users = {path for path in users if not path.startswith(GRPC_OF_CLIENT)}
    assert users == FOREIGN[library]


def test_importing_the_package_costs_nothing() -> None:
    assert imports("memstore/__init__.py") == []
