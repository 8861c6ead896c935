"""The commands of the quality benchmarks at toy size, and the training behind them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from models import CONFIGS
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import report as reports
from benchmarks.quality import adapt, data, mentions, planting, recall, table, tables
from benchmarks.quality.fleet import LOG, Fleet
from benchmarks.quality.reading import Reading
from benchmarks.quality.streams import Corpus
from benchmarks.quality.training import Training, Trial
from integration.demo.command import WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name of older versions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of two domains and a base model, tiny."""
    path = tmp_path_factory.mktemp("quality")
    tokenizer = data.Tokenizer.from_file(str(WEIGHTS / "base" / "tokenizer.json"))
    data.save(tokenizer, path)
    (path / "words.json").write_text(json.dumps({"train": ["alpha"] * 20, "probe": [f"probe{n}" for n in range(90)]}))
    (path / "token_bytes.json").write_text(json.dumps(data.token_bytes(tokenizer)))
    rng = np.random.default_rng(0)
    for domain, split in data.SPLITS:
        words = [f"name_{rng.integers(0, 50)}" for _ in range(900)]
        documents = [{"id": f"{domain}-{n}", "text": " ".join(rng.permutation(words))} for n in range(2)]
        data.write_split(tokenizer, documents, path / f"{domain}-{split}", None)
    changes = {"vocab_size": 4096, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(1)
    config = LlamaConfig(**(CONFIGS["llama"] | changes))
    LlamaForCausalLM(config).save_pretrained(path / "base")
    return path


def _main(monkeypatch: pytest.MonkeyPatch, module: Any, *words: object) -> int:
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, words)])
    status: int = module.main()
    return status


def _tables(monkeypatch: pytest.MonkeyPatch, folder: Path, names: str, *more: object) -> dict[tuple[str, str], float]:
    """The figures of the last of some tables, made at toy size of what `runs` has."""
    monkeypatch.setattr(reports, "RESULTS", folder / "results")
    given = ("--base", folder / "base", "--data", folder, "--runs", folder / "runs", "--length", 1536)
    assert _main(monkeypatch, tables, names, *given, *more) == 0
    rows = json.loads((folder / "results" / f"quality-{names.split(',')[-1]}.json").read_text())["rows"]
    return {(row["case"], row["figure"]): row["value"] for row in rows}


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """Ours, LoRA only and Memorizing Transformers, two steps each."""
    shared = json.dumps({"capacity": 64, "dim": 8, "retrieval_layer": 1, "attention_layers": [1, 2], "segment": 32})
    with pytest.MonkeyPatch.context() as patch:
        given = ["--base", folder / "base", "--data", folder, "--out", folder / "runs", "--shared", shared]
        given += ["--steps", 2, "--batch", 2, "--variant", "ours,lora,mt", "--length", 1024, "--capacities", 64]
        assert _main(patch, adapt, *given) == 0
    return folder / "runs"


def test_variants_are_trained_and_read(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / LOG).read_text().splitlines()]
    assert {row["name"]: row["steps"] for row in rows} == dict.fromkeys(("ours", "lora", "mt"), 2)
    assert all(row["books"] > 1 and len(row["read_64"]["code"]) == 2 for row in rows)


def test_capacity_is_read_at_toy_size(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--capacities", 0, 64, "--variants", "ours", "mt", "--domains", "books")
    figures = _tables(monkeypatch, runs.parent, "capacity", *more)
    assert figures["books, ours, 0K entries", "perplexity"] > 1
    assert figures["books, nothing trained", "perplexity"] > 1
    assert len([case for case, _ in figures if "another document's memory" in case]) == 5


def test_what_was_retrieved_is_told_at_toy_size(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = runs.parent / "page.html"
    _tables(monkeypatch, runs.parent, "fidelity,mentions", "--page", page, "--domains", "books")
    assert "What the memory was read for" in page.read_text()


def test_trials_and_recall_are_told_at_toy_size(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recalled = _tables(monkeypatch, runs.parent, "recall")
    assert {case.rsplit(", ", 1)[1] for case, _ in recalled} == {"memory", "no memory"}
    told = _tables(monkeypatch, runs.parent, "trials")
    assert abs(told["ours, 2 steps", "books against LoRA only"]) < 5
    assert not any(case.startswith("lora") and "against" in figure for case, figure in told)
    assert ("mt, 2 steps", "code, high end") in told


def test_without_trainings_the_weights_that_ship_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "RESULTS", folder / "results")
    assert _main(monkeypatch, tables, "domains", "--data", folder, "--domains", "docs", "--length", 1024) == 0
    rows = json.loads((folder / "results" / "quality-domains.json").read_text())["rows"]
    figures = {(row["case"], row["figure"]): row["value"] for row in rows}
    assert figures["docs, ours, 16K entries", "perplexity"] < figures["docs, LoRA only", "perplexity"]
    assert ("docs, ours, 128K entries", "perplexity") not in figures


def test_tables_of_trainings_ask_for_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, tables, "shorts,trials", "--data", folder) == 2
    assert capsys.readouterr().out.count("--runs is needed") == 2


def _trial(**changes: Any) -> Trial:
    shared = {"capacity": 64, "dim": 8, "retrieval_layer": 1, "attention_layers": (1, 2), "segment": 32}
    return Trial(**({"name": "ours", "changes": shared, "steps": 4, "batch": 4} | changes))


@pytest.fixture
def corpus(folder: Path) -> Corpus:
    return Corpus(folder, torch.device("cpu"), 1024)


def _training(folder: Path, corpus: Corpus, **changes: Any) -> Training:
    return Training(_trial(**changes), LlamaForCausalLM.from_pretrained(folder / "base"), corpus)


def test_a_training_reads_what_its_plan_says_and_learns(folder: Path, corpus: Corpus) -> None:
    training = _training(folder, corpus, rate=1e-2, lora_rate=1e-2, steps=30)
    assert training.begun[0].all()
    report = training.run(float("inf"))
    losses = training.losses.tolist()
    assert report["steps"] == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    again = _training(folder, corpus, rate=1e-2, lora_rate=1e-2, steps=30)
    again.run(float("inf"))
    np.testing.assert_allclose(again.losses.tolist(), losses, rtol=1e-3)  # one seed, one run


def test_a_training_goes_on_from_an_adapter(folder: Path, corpus: Corpus) -> None:
    first = _training(folder, corpus, rate=1e-2, lora_rate=1e-2)
    first.run(float("inf"), folder / "first")
    second = _training(folder, corpus, begin=str(folder / "first"))
    kept = dict(first.network.trained())
    for name, parameter in second.network.trained():
        assert torch.equal(parameter, kept[name]), name
    assert any((kept[name] != parameter).any() for name, parameter in _training(folder, corpus).network.trained())


def test_a_fleet_goes_on_where_one_trial_fails(
    folder: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "fleet"
    out.mkdir()
    fleet = Fleet(folder / "base", corpus, out, length=1024)
    bad = _trial(name="bad", changes={"retrieval_layer": 2, "attention_layers": (1,)})
    fleet.run([_trial(name="lora", variant="lora"), bad, _trial()], float("inf"), (64,))
    assert fleet.failures == 1
    assert set(fleet.found) == {"lora", "ours"}
    assert "ConfigError" in capsys.readouterr().err


def test_exchanged_names_are_other_names_throughout_a_document(folder: Path, corpus: Corpus) -> None:
    training = _training(folder, corpus, renamed=1.0, steps=40)
    assert training.picks is not None
    books, code = training.picks[:, :2], training.picks[:, 2:]
    assert (books > 0).all()
    assert not code.any()
    changed = (books[1:] != books[:-1]) & ~training.begun[1:, :2]
    assert not changed.any()
    plain, exchanged = corpus.exchanges[0], corpus.exchanges[1]
    assert sorted(exchanged.tolist()) == plain.tolist()
    assert 10 < int((plain != exchanged).sum()) < 500


def test_facts_are_asked_in_the_words_they_were_told_in_and_beyond_the_window(folder: Path) -> None:
    tokenizer = data.Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents, _ = data.load(folder, "books", "train")
    long = data.Documents(np.tile(documents.ids, 40), np.array([0, 40 * len(documents.ids)]))
    words = [f"word{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    text = tokenizer.decode(planting.planted(long, tokenizer, words).ids.tolist())
    told = [line for line in text.split("\n\n") if line.startswith("The pass key of the")]
    assert len(told) > len(set(told)) > 3
    assert not any(planting.PROBE_PLACE in line for line in told)
    book = np.tile(documents.ids, 4)[:4096]
    probed = planting.probe(book, 2048, tokenizer, words, np.random.default_rng(0))
    kinds = [kind for kind, _, _ in probed.spans]
    assert (kinds.count("key"), kinds.count("pair"), kinds.count("order")) == (1, 8, 1)
    for _, begin, count in probed.spans:
        before = tokenizer.decode(probed.ids[:begin].tolist())
        opening = before[before.rindex("\n\n") :]
        answer = tokenizer.decode(probed.ids[begin : begin + count].tolist())
        assert before.index(opening + answer + ".") < before.rindex(opening) - 2048


def test_answers_are_right_where_every_token_is_the_likeliest() -> None:
    probes = [planting.Probe(np.arange(12), [("key", 4, 2), ("pair", 8, 2)])]
    is_right = np.ones((1, 12), bool)
    is_right[0, 8] = False
    figures = recall.right(probes, Reading(losses=np.ones((1, 12), np.float32), seconds=0.0, is_right=is_right))
    assert figures == {"key": (100.0, 100.0, 1.0), "pair": (50.0, 0.0, 1.0)}


def test_rare_words_are_told_by_their_mentions(folder: Path) -> None:
    to_bytes = mentions.Bytes(folder)
    tokenizer = data.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.array(tokenizer.encode("see Zanzibar then Zanzibar; common common").ids)
    assert b"".join(to_bytes.of(ids)) == b"see Zanzibar then Zanzibar; common common"
    found = list(mentions.mentions(ids, {b"common", b"then"}, to_bytes))
    assert [(each.word, each.number) for each in found] == [(b"Zanzibar", 1), (b"Zanzibar", 2)]
    first, second = found
    assert b"".join(to_bytes.of(ids[first.begin : first.end])).strip() == b"Zanzibar"
    assert second.since == second.begin - first.begin


def test_the_interval_of_differences_is_that_of_student() -> None:
    low, high = table.interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (low, high) == pytest.approx((3 - 1.9634, 3 + 1.9634), abs=1e-3)
    assert table.percent(0.0) == 0.0
