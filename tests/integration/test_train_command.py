"""memstore train, as it is typed: a tiny random model, a few steps, going on, and what it refuses."""

from __future__ import annotations

import json
import random
import re
import stat
from pathlib import Path

import pytest
import torch

from integration import attach, load_adapter
from integration.demo import command as demo
from integration.training.command import ADAPT_HELP, MEMORY_HELP
from memstore.__main__ import main
from model_client import MemoryClient

TOKENIZER = demo.WEIGHTS / "base"
SHORT = ["--segment", "16", "--batch", "2", "--warmup", "1", "--judge-rows", "2", "--judge-segments", "3"]
SHORT += ["--top-k", "2", "--capacity", "64", "--evaluations", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random model with the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("train") / "model"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def books(tmp_path: Path) -> list[str]:
    """Three documents of about 1,000 tokens."""
    chosen = random.Random(0)
    files = []
    for name in ("a", "b", "c"):
        words = chosen.choices(["the", "memory", "of", "a", "model", "holds", "states"], k=800)
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text(" ".join(words))
    return [str(file) for file in files]


def test_it_trains_goes_on_and_gives_an_adapter_that_attaches(
    model: str, books: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    words = ["train", "--model", model, "--data", books[0], "--validation", *books[1:], "--out", str(out), *SHORT]
    assert main([*words, "--steps", "2", "--resume"]) == 0
    captured = capsys.readouterr()
    told = captured.out
    assert f"no checkpoint in {out}, training begins anew\n" in captured.err
    assert "2 steps in " in told
    assert re.search(r"with_memory +\d+\.\d{4}\n", told)
    assert main([*words, "--steps", "3", "--resume", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 3
    assert 0 < report["steps_per_s"] < 1e6  # the evaluation at the end is no part of it
    assert report["steps_without_memory"] == 0
    assert report["verdict"]["tokens"] == 2 * 3 * 16
    written = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert written == [2, 3]  # what the first run wrote is kept
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (out / "memory.safetensors", out / "memory_config.json")}
    assert modes == {stat.S_IMODE((out / "report.json").stat().st_mode)}
    adapter = load_adapter(out)
    assert (adapter.config.top_k, adapter.config.capacity, adapter.config.segment_length) == (2, 64, 16)
    _, loaded = demo.load_model(Path(model), "cpu")
    with MemoryClient(":memory:") as client, attach(loaded, client, adapter.config, adapter.weights) as memory:
        memory.read(torch.arange(3, 67)[None])
        assert memory.stats.steps_with_memory == 4


def test_a_part_of_the_data_is_held_out_by_default(
    model: str, books: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", model, "--data", *books, "--out", str(tmp_path / "out"), "--steps", "1", "--json"]
    assert main(["train", *words, *SHORT]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"]["tokens"] == 2 * 3 * 16


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (["--segment", "128"], r"the last 5% of --data are 1\d\d tokens; give documents .* by --validation"),
        (["--validation", "A"], "--validation: two documents of 1025 tokens or more are needed"),
        (["--data", "nowhere.txt", "--model", "/no/model"], "nowhere.txt: no such file or folder"),
        (["--validation", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--model", "/no/model"], "--model=/no/model: no such folder"),
        (["--attention-layers", "9"], "attention_layers: layer 9 named, the model has 3 layers"),
        (["--data", "LINES"], 'line 2 is no JSON object with a "text"'),
        (["--target", "unix:///nowhere"], "--target=unix:///nowhere: "),
    ],
)
def test_what_cannot_be_trained_on_is_named(
    changed: list[str],
    complaint: str,
    model: str,
    books: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("integration.training.adapt.CALL_S", 0.2)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "one"}\n{"txt": "two"}\n')
    named = {"A": books[0], "LINES": str(lines)}
    words = ["--model", model, "--data", *books, "--out", str(tmp_path / "out"), "--steps", "1", *SHORT]
    words += [named.get(word, word) for word in changed]
    if "--validation" in changed:
        words += ["--segment", "512"]
    assert main(["train", *words]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("memstore train: ")
    assert re.search(complaint, said)


@pytest.mark.parametrize("words", [["--batch", "0"], ["--device", "abacus"], ["--dtype", "int4"]])
def test_arguments_that_make_no_sense_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--model", "m", "--data", "d", "--out", "o", *words])
    assert f"argument {words[0]}: " in capsys.readouterr().err


def test_training_without_an_end_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--model", "m", "--data", "d", "--out", "o", "--steps", "0"])
    assert "--steps 0 needs --minutes" in capsys.readouterr().err
    for words in (["--steps", "-1"], ["--minutes", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--model", "m", "--data", "d", "--out", "o", *words])
        assert f"{words[0]}: 0 or more" in capsys.readouterr().err


def test_help_tells_every_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    told = capsys.readouterr().out
    for name in (*ADAPT_HELP, *MEMORY_HELP):
        assert re.search(rf"--{name.replace('_', '-')} [A-Z_]+\s+\w.*\(default: \S+\)\n", told), name
