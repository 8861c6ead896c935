"""The quality benchmarks: what is trained is what the service runs, policies, and every command at toy size."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from models import random_weights
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import report as reports
from benchmarks.quality import adapt, data, mentions, planting, recall, table, tables
from benchmarks.quality.attending import Read as ReadRows
from benchmarks.quality.attending import attend, later, sooner
from benchmarks.quality.fleet import LOG, Fleet
from benchmarks.quality.memorizing import MemorizingWeights
from benchmarks.quality.network import Gathered, Network, NetworkSpec, Ring, exact_top, merge_forward, nearness, widen
from benchmarks.quality.policies import POLICIES, PolicyCache
from benchmarks.quality.reading import Reading, Variant, read
from benchmarks.quality.streams import Corpus
from benchmarks.quality.training import Training, Trial
from integration.adapter import Adapter, add_lora
from integration.config import MemoryConfig
from integration.demo.command import WEIGHTS
from integration.weights import MemoryWeights

if TYPE_CHECKING:
    from pathlib import Path

    from model_client import MemoryClient

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name of older versions

VOCABULARY, SEGMENT, CAPACITY = 64, 16, 64


def _model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _config(model: LlamaForCausalLM) -> MemoryConfig:
    changes: dict[str, Any] = {"retrieval_layer": 1, "attention_layers": (1, 2), "dim": 16, "top_k": 4, "after": 1}
    return MemoryConfig.for_model(model, capacity=CAPACITY, context=1, segment_length=SEGMENT, dtype="fp32", **changes)


def _windows(length: int = 12 * SEGMENT) -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCABULARY, (2, length + 1))


def _through_network(network: Network, windows: np.ndarray) -> np.ndarray:
    network.make_ring(len(windows), SEGMENT, torch.float32)
    parts = [windows[:, begin : begin + SEGMENT + 1] for begin in range(0, windows.shape[1] - 1, SEGMENT)]
    with torch.no_grad():
        return torch.cat([network.losses(torch.from_numpy(part)) for part in parts], dim=1).numpy()


def test_what_is_trained_is_what_the_service_runs(client: MemoryClient) -> None:
    model = _model()
    config = _config(model)
    weights = random_weights(model, config)
    network = Network(_model(), NetworkSpec(kind="memory", config=config, lora_rank=0))
    network.weights.load_state_dict(weights.state_dict())
    trained = _through_network(network, _windows())
    variant = Variant(model, {"segment": SEGMENT}, Adapter(config, weights.eval()))
    served = read(variant, _windows(), capacity=CAPACITY, client=client)
    without = read(variant, _windows())
    assert np.abs(served.losses - without.losses).max() > 0.05
    np.testing.assert_allclose(trained, served.losses, atol=2e-3)


def test_memorizing_transformers_are_trained_as_the_service_runs_them(client: MemoryClient) -> None:
    model = _model()
    config = replace(_config(model), top_k=4)
    network = Network(_model(), NetworkSpec(kind="mt", config=config, lora_rank=0))
    torch.nn.init.constant_(network.weights.gate, 1.0)
    own = MemorizingWeights(model.model.layers[1].self_attn)
    own.load_state_dict(network.weights.state_dict())
    network.make_ring(2, SEGMENT)
    parts = [_windows()[:, begin : begin + SEGMENT + 1] for begin in range(0, 12 * SEGMENT, SEGMENT)]
    with torch.no_grad():
        trained = torch.cat([network.losses(torch.from_numpy(part)) for part in parts], dim=1).numpy()
    variant = Variant(model, {"segment": SEGMENT, "layer": 1, "top_k": 4}, memorizing=own)
    served = read(variant, _windows(), capacity=CAPACITY, client=client)
    without = read(variant, _windows())
    assert np.abs(served.losses - without.losses).max() > 0.01
    assert np.abs(trained - served.losses).mean() < 2e-3  # both keep bf16; a tie may fall otherwise


def test_another_documents_memory_is_read_without_being_filled(client: MemoryClient) -> None:
    model = _model()
    config = _config(model)
    variant = Variant(model, {"segment": SEGMENT}, Adapter(config, random_weights(model, config).eval()))
    windows = _windows()
    same = np.stack([windows[0], windows[0]])
    own = read(variant, same, capacity=CAPACITY, client=client)
    other = read(variant, same, capacity=CAPACITY, client=client, other=True)
    np.testing.assert_allclose(own.losses, other.losses, atol=1e-4)  # another document that is the same one
    assert (
        np.abs(read(variant, windows, capacity=CAPACITY, client=client, other=True).losses[0] - own.losses[0]).max()
        > 0.01
    )


@pytest.mark.parametrize("columns", [64 * 5, 64 * 40, 100])
def test_top_by_tiles_is_exact(columns: int) -> None:
    scores = torch.randn(3, 7, columns)
    assert torch.equal(exact_top(scores, 5), scores.topk(5, dim=-1).indices)


def test_nearness_is_half_the_negative_squared_distance_and_nothing_where_empty() -> None:
    queries, kept = torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    kept = torch.nn.functional.layer_norm(kept, (16,))
    queries = torch.nn.functional.layer_norm(queries, (16,))
    is_empty = torch.zeros(2, 9, dtype=torch.bool)
    is_empty[1, 4:] = True
    found = nearness(queries, kept, is_empty)
    wanted = (torch.cdist(queries, kept).square() / -2).masked_fill(is_empty[:, None], float("-inf"))
    assert torch.allclose(found, wanted, atol=1e-3)


def test_later_and_sooner_undo_each_other_within() -> None:
    values = torch.arange(1, 6).view(1, 5, 1).float()
    assert later(values, 2).flatten().tolist() == [0, 0, 1, 2, 3]
    assert sooner(values, 2).flatten().tolist() == [3, 4, 5, 0, 0]
    assert later(values, 0) is values


@pytest.mark.parametrize("context", [1, 2, 3])
def test_attention_over_rows_that_are_not_copied_is_that_over_copies(context: int) -> None:
    config = replace(_config(_model()), context=context, after=2)
    attention = random_weights(_model(), config).cache_attention(2)
    rows, is_live = torch.randn(2, 7, 12, config.dim, requires_grad=True), torch.rand(2, 7, 12) > 0.3
    keys, hidden = torch.randn(2, 7, config.dim), torch.randn(2, 7, 32)
    found = attend(attention, hidden, ReadRows(rows, is_live, keys, context))
    copied, live = widen(rows.masked_fill(~is_live[..., None], 0.0), is_live, context)
    entries = torch.where(live, 0, -1).flatten(0, 1)
    wanted = attention(hidden.flatten(0, 1), Gathered(copied.flatten(0, 1), entries, keys.flatten(0, 1)))
    assert torch.allclose(found.flatten(0, 1), wanted, atol=1e-4)
    ours, theirs = (torch.autograd.grad(each.square().sum(), rows, retain_graph=True)[0] for each in (found, wanted))
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_heads_with_hits_of_their_own_begin_as_one_retrieval_for_all() -> None:
    model = _model()
    config = replace(_config(model), context=2)
    weights, found = random_weights(model, config), []
    for kind in ("memory", "heads"):
        network = Network(_model(), NetworkSpec(kind=kind, config=config, lora_rank=0))
        network.weights.load_state_dict(weights.state_dict())
        network.part_heads()
        found.append(_through_network(network, _windows()))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert len(network.weights) == config.num_heads


def test_a_lora_layer_in_one_product_is_the_same() -> None:
    adapted = add_lora(_model(), 4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.from_numpy(_windows(20))
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        merge_forward(adapted)
        assert torch.allclose(adapted(input_ids=ids).logits, before, atol=1e-4)


def test_a_ring_gives_neighbours_by_position_and_none_beyond_its_ends() -> None:
    ring = Ring(1, 8, 4, {"hidden": (1,)}, device="cpu")
    for begin in range(0, 12, 4):
        ring.append(hidden=torch.arange(begin, begin + 4).view(1, 4, 1).float())
    places, is_live = ring.neighbours(torch.tensor([[[3, 4]]]), 1, 1)  # positions 11 and 4 of 4..11
    assert is_live.tolist() == [[[[True, True, False], [False, True, True]]]]
    assert ring.hidden[0, places[0, 0, 0, :2], 0].tolist() == [10.0, 11.0]
    ring.begin(torch.tensor([True]))
    assert ring.is_empty().all()


def _positions(policy: str, *, hits: tuple[int, ...] = ()) -> set[int]:
    """What is kept of 12 rows in 8 places when row 9 onwards came; hits: positions hit before those."""
    cache = PolicyCache(policy, 1, 8, 4, 64, "cpu")
    rows = torch.nn.functional.normalize(torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    cache.append(rows[:, :8])
    if hits:
        slots = torch.tensor([[int(cache.slots[0, each]) for each in hits]])
        cache.credit(slots, torch.ones(1, len(hits)))
    cache.append(rows[:, 8:])
    return set(cache.positions[0].tolist())


def test_policies_keep_what_they_say() -> None:
    newest = {8, 9, 10, 11}
    assert _positions("fifo") == {4, 5, 6, 7} | newest
    assert _positions("lru", hits=(0, 1)) == {0, 1, 6, 7} | newest
    assert {0, 1} <= _positions("attention", hits=(0, 1))
    for policy in POLICIES:
        kept = _positions(policy)
        assert newest <= kept
        assert len(kept) == 8
    assert _positions("random") == _positions("random")


def test_a_duplicate_leaves_first() -> None:
    cache = PolicyCache("duplicates", 1, 8, 8, 64, "cpu")
    cache.append(torch.eye(8)[None])
    cache.append(torch.eye(8)[None, 2:4] * 1.0)
    assert set(cache.positions[0].tolist()) == {0, 1, 4, 5, 6, 7, 8, 9}


def test_weights_begin_as_their_layers_read() -> None:
    model = _model()
    config = replace(_config(model), dim=32, head_dim=8, num_kv_heads=2)
    weights = MemoryWeights.for_model(model, config)
    states = torch.randn(512, 32)
    weights.fit(model, states)
    layer = model.model.layers[2]
    wanted = layer.self_attn.v_proj(layer.input_layernorm(states - states.mean(dim=0)))
    own = weights.cache_attention(2)
    found = own.v_proj(weights.projection(states))
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.98
    assert 0.9 < (found.norm() / wanted.norm()).item() < 1.1
    assert not own.o_proj.weight.any()


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
    config = LlamaConfig(**(_model().config.to_dict() | {"vocab_size": 4096}))
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
