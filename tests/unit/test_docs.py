"""The documents against the code: promises have tests, modules have lines, commands exist, examples run."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from integration import Adapter, MemoryConfig, MemoryWeights, load_adapter, save_adapter
from integration.demo import command as demo
from integration.demo.report import Report
from integration.demo.server import running_server
from integration.families import FAMILIES
from integration.training import command as training
from integration.training.adapt import AdaptOptions
from memstore import __main__ as command_line
from memstore import config, errors, status
from memstore.tokens import hash_of, parse_tokens
from memstore.wire import limits
from tests.unit.test_layering import ORDER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
PACKAGES = ("memstore", "model_client", "integration")
BASE = "integration/demo/weights/base"
ADAPTER = "integration/demo/weights/adapter"


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The lines of the documents' sh blocks that run `program`, split into words, without it."""
    lines = [line for document in DOCUMENTS for block in blocks(document, "sh") for line in block.splitlines()]
    words = [shlex.split(line) for line in lines]
    return [rest for first, *rest in words if first == program]


@cache
def defined(file: Path) -> set[str]:
    """What a test may be called by: top-level names, and names within classes as Class::name."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            body = node.body if isinstance(node, ast.ClassDef) else []
            found.update(f"{node.name}::{each.name}" for each in body if isinstance(each, ast.FunctionDef))
    return found


def promises() -> list[str]:
    """The items of guarantees.md, each with all of its lines."""
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    return [" ".join(item.split()) for item in re.findall(r"^- (.*?)(?=^- |^#|\Z)", text, re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize("promise", promises())
def test_every_promise_names_tests_that_exist(promise: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", promise)
    assert named, f"no test is named by: {promise}"
    for file, name in named:
        assert name in defined(ROOT / file), f"{file} has no {name}"


def tree_lines() -> dict[str, str]:
    """Path -> what its line in the tree of architecture.md says."""
    tree = next(block for block in blocks(ARCHITECTURE, "") if block.startswith("memstore/"))
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in tree.splitlines():
        indent, name, text = re.fullmatch(r"( *)(\S+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        depth = len(indent) // 2
        folders = [*folders[:depth], name]
        found["".join(folders).rstrip("/")] = text
    return found


def modules() -> set[str]:
    """Every module of the three packages, and every folder that holds one; what is generated counts as its folder."""
    files = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files = [path for path in files if path.parts[:2] != ("memstore", "v1")]
    names = {path.as_posix() for path in files if path.name != "__init__.py"}
    return names | {path.parent.as_posix() for path in files} | {"memstore/v1"}


def test_every_module_has_its_line_in_the_tree_and_no_other_has() -> None:
    lines = tree_lines()
    assert set(lines) == modules()
    assert [path for path, text in lines.items() if not text] == []


def test_the_layers_are_those_that_are_enforced() -> None:
    (layers,) = re.findall(r"`(v1 types [^`]*)`", ARCHITECTURE.read_text())
    assert layers.replace("|", " ").split() == ORDER


def test_the_error_table_is_that_of_the_code() -> None:
    table = re.findall(r"^\| `(\w+)` \| .* \| `([A-Z_]+)` \| .* \|$", ARCHITECTURE.read_text(), re.MULTILINE)
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MemstoreError)
    ]
    wanted = {}
    for kind in kinds:
        error = kind.__new__(kind)
        errors.MemstoreError.__init__(error, "")
        error.retry_delay_s = 0.0  # type: ignore[attr-defined]  # what Overloaded carries
        if kind is not errors.MemstoreError:
            wanted[kind.__name__] = status.answer(error, "").code.name
    assert dict(table) == wanted


def test_the_limits_are_those_of_the_contract() -> None:
    rows = re.findall(r"^\| (.+) \| ([\d,]+)(?: each| MiB)? \|$", README.read_text(), re.MULTILINE)
    values = [int(number.replace(",", "")) for _, number in rows]
    assert values == [
        limits.MAX_DIM,
        limits.MAX_CAPACITY,
        limits.MAX_LARGE_CAPACITY,
        limits.MAX_SEQUENCES,
        limits.MAX_SPILLED,
        limits.MAX_LAYERS,
        limits.MAX_PAYLOADS,
        limits.MAX_PARTS,
        limits.MAX_TOP_K,
        limits.MAX_WINDOW_SIDE,
        limits.MAX_MESSAGE_BYTES >> 20,
    ]


def test_the_families_are_those_of_the_code() -> None:
    found = re.search(r"<!-- FAMILIES -->(.*?)<!-- /FAMILIES -->", README.read_text(), re.DOTALL)
    assert found is not None
    assert found[1].replace("\n", " ").split(", ") == sorted(FAMILIES)


def test_the_length_of_training_is_that_of_the_code() -> None:
    options = AdaptOptions()
    told = f"{options.steps:,} steps of {options.batch} x {options.segment} tokens"
    assert told in " ".join(README.read_text().split())


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "".join(document.read_text() for document in DOCUMENTS)
    named = {words[0] for words in commands("make")} | set(re.findall(r"`make ([\w-]+)", text))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("words", commands("memstore"), ids=" ".join)
def test_every_command_line_is_understood(words: list[str]) -> None:
    match words[0]:
        case "demo":
            demo._parse(words[1:])
        case "train":
            training._parse(words[1:])
        case _:
            command_line._parser([]).parse_args(words)


def test_every_composition_that_is_named_exists() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    profiles = {profile for service in services.values() for profile in service["profiles"]}
    for words in commands("docker"):
        assert words[:2] == ["compose", "--profile"]
        assert words[2] in profiles
        assert words[3] == "up" or words[-1] in services
    assert set(re.findall(r"`--profile (\w+)`", README.read_text())) <= profiles


def test_the_line_that_makes_a_token_file_makes_one(tmp_path: Path) -> None:
    (line,) = (line for block in blocks(README, "sh") for line in block.splitlines() if "sha256sum" in line)
    environment = {"TOKEN": "a secret", "PATH": os.environ["PATH"]}
    subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, check=True)
    (known,) = parse_tokens((tmp_path / "tokens").read_text()).identities.items()
    assert (known[0], known[1].tenant) == (hash_of("a secret"), "team-a")


def test_every_setting_that_is_named_exists() -> None:
    settings = {
        f"MEMSTORE_{field.name.upper()}" for field in dataclasses.fields(config.Config)
    } | config.CLIENT_VARIABLES
    text = "".join(document.read_text() for document in DOCUMENTS)
    assert set(re.findall(r"MEMSTORE_[A-Z_]+[A-Z]", text)) <= settings


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere_and_no_machine_is_named(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        is_picture_of_a_run = link == "docs/demo.png" and not (ROOT / "docs" / "demo.json").exists()
        assert is_picture_of_a_run or (document.parent / link).exists(), link
    assert re.findall(r"(?<![\w.])/(?:work|root|home|tmp|mnt)/\S*|localhost:\d+/simple", text) == []


@pytest.fixture(scope="module")
def update() -> ModuleType:
    """tools/update_readme.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "tools" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_current(update: ModuleType) -> None:
    assert update.stale(ROOT) == []


def test_numbers_are_those_of_the_run(update: ModuleType, tmp_path: Path) -> None:
    report = Report(
        text="a text",
        other_text="another",
        tokens=100_000,
        bytes=345_678,
        perplexity_memory=9.0,
        perplexity_none=10.0,
        perplexity_other_document=10.5,
        bits_per_byte_memory=0.8123,
        bits_per_byte_none=0.9,
        tokens_per_s=1234.0,
        tokens_per_s_none=2345.0,
        retrieval_share=0.125,
        transport="grpc-stream",
        steps_without_memory=0,
        memory={"capacity": 16_384},
        model_parameters=6_850_000,
        memory_parameters=500_000,
        lora_parameters=360_000,
        machine="a machine of two cores",
    )
    (tmp_path / "docs").mkdir()
    report.write(tmp_path / "docs" / "demo.json")
    text = update.demo_numbers(tmp_path)
    numbers = (
        "-10.0%",
        "+5.0%",
        "0.8123",
        "100,000 tokens",
        "6.85 M",
        "0.50 M",
        "0.36 M",
        "capacity 16384",
        "1,234",
        "12.5%",
        "two cores",
    )
    for number in numbers:
        assert number in text


def test_a_result_tells_how_many_rows_reach_their_goal(update: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"case": "a", "figure": "f", "value": value, "unit": "ratio", "goal": goal, "better": better}
        for value, goal, better in (
            (0.9, 1.0, "lower"),
            (1.1, 1.0, "lower"),
            (2.0, 1.0, "higher"),
            (3.0, None, "lower"),
        )
    ]
    result = {"commit": "0123456789abcdef", "machine": "two cores", "command": "make bench", "rows": rows}
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "search.json").write_text(json.dumps(result))
    line = update.benchmark_results(tmp_path).splitlines()[-1]
    assert line == "| `search.json` | two cores | 012345678 | `make bench` | 2 of 3 |"


def test_every_dependency_has_its_licence_named() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|cpu|gpu|hf|dev|soak) = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    needed = {name for each in lists for name in re.findall(r"\"([A-Za-z0-9_.-]+)", each)}
    rows = re.findall(r"^\| `([\w.-]+)` \| \w* ?\| .+ \|$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    assert set(rows) == needed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny random model with the demo's tokenizer, and an adapter for it, under the names that the README has."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("docs")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / BASE)
    tokenizer.save_pretrained(folder / "model")
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(shape)
    model.save_pretrained(folder / "model")
    memory = MemoryConfig.for_model(model, memory="adapted", capacity=64)
    save_adapter(folder / "adapter", memory, MemoryWeights.for_model(model, memory))
    return {BASE: str(folder / "model"), ADAPTER: str(folder / "adapter")}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a real server, a process of its own."""
    with running_server() as target:
        yield target


def run(source: str, replaced: dict[str, str]) -> dict[str, Any]:
    """Runs a block as it stands but for some strings, and gives its names."""
    for old, new in replaced.items():
        source = source.replace(f'"{old}"', repr(new))
    names: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), names)  # noqa: S102  that is what a reader does
    return names


def test_the_fifteen_lines_print_what_a_memory_is_worth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def patient(folder: str) -> Adapter:
        """An adapter that waits for its rows, whatever else the machine does."""
        adapter = load_adapter(folder)
        return dataclasses.replace(adapter, config=adapter.config.with_changes(deadline_s=60.0))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("integration.load_adapter", patient)
    source = next(block for block in blocks(README, "python") if "memory.read(" in block)
    assert len(source.splitlines()) == 15
    stats = run(source, {})["memory"].stats
    assert stats.steps_without_memory == stats.lost_rows == stats.failures == 0
    assert stats.appended_rows > 3000
    having, lacking = map(float, re.findall(r"([\d.]+) with", capsys.readouterr().out))
    assert having < 0.8 * lacking


def test_every_python_block_runs_against_a_server(
    folders: dict[str, str], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sources = blocks(README, "python")
    assert len(sources) == 3
    before = torch.random.get_rng_state()
    for source in sources:
        run(source, {**folders, ":memory:": server, "127.0.0.1:7077": server})
    torch.random.set_rng_state(before)
