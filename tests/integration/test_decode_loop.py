"""Decode loops: passes of one token, whose reading is recorded once, are what passes of their own are."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import torch
from models import FAMILIES, VOCABULARY, random_weights, tiny_config, tiny_model
from transformers import DynamicCache

from integration import loops
from integration.attach import attach
from integration.decode import DecodeLoop
from integration.errors import AttachError
from integration.recorded import Recorder
from model_client import Retrieval
from model_client.standing import StandingStep

if TYPE_CHECKING:
    from torch import nn

    from integration import AttachedMemory, MemoryConfig, MemoryWeights
    from model_client import MemoryClient

BATCH, PROMPT, STEPS = 2, 5, 40

pytestmark = pytest.mark.usefixtures("each_device")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops on the host, too, where nothing is recorded, but all else is the same."""
    monkeypatch.setattr(loops, "DEVICES", {"cpu", "cuda"})


def _tokens(length: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (BATCH, length), generator=generator, device="cpu")
    return tokens.to(torch.get_default_device())


def _decode(model: nn.Module, tokens: torch.Tensor, past: DynamicCache, first: int = PROMPT) -> list[torch.Tensor]:
    """The prompt in one pass, then token by token: the logits of each pass."""
    passes = [tokens[:, :first], *torch.split(tokens[:, first:], 1, dim=1)] if first else torch.split(tokens, 1, dim=1)
    return [model(input_ids=part, past_key_values=past, use_cache=True).logits[:, -1] for part in passes]


def _rows(client: MemoryClient, memory: str, name: str) -> torch.Tensor:
    described = client.describe_memory(memory).spec
    session = client.session(memory, [name])
    hits = session.retrieve(torch.zeros(1, described.dim), [1], Retrieval(described.capacity)).hits
    assert hits is not None
    return hits.rows["key"].float().cpu()


def _passes(memory: AttachedMemory) -> int:
    """How many passes the loop under way has had."""
    loop = memory._loops.loop  # it has no outer sign
    return 0 if loop is None else loop.num_passes


@pytest.mark.parametrize("changes", [{}, {"context": 1}, {"context": 3, "before": 1}, {"null_slot": False}])
@pytest.mark.parametrize("family", ["llama", "gptj", "gpt_neox"])
def test_a_loop_gives_what_single_passes_give(
    family: str, changes: dict[str, Any], client: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, rows that are kept, and counters; over several segments."""
    model, tokens = tiny_model(family), _tokens(PROMPT + STEPS)
    config = tiny_config(model, **changes)
    weights = random_weights(model, config)
    found, rows, stats = [], [], []
    for devices in (set(), {"cpu", "cuda"}):
        monkeypatch.setattr(loops, "DEVICES", devices)
        with torch.inference_mode(), attach(model, client, config, weights) as memory:
            memory.new_documents([f"{len(devices)} {row}" for row in range(BATCH)])
            memory.read(_tokens(20, seed=4))
            found.append(_decode(model, tokens, DynamicCache(config=model.config)))
            assert bool(_passes(memory)) == bool(devices)
            memory.flush()
            stats.append(memory.stats)
            rows.append([_rows(client, config.memory, name) for name in memory.sequences])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-4)
    assert stats[1].appended_rows == BATCH * (20 + PROMPT + STEPS)
    for name in ("steps_with_memory", "steps_without_memory", "appended_rows", "lost_rows", "failures"):
        assert getattr(stats[0], name) == getattr(stats[1], name), name


@pytest.mark.parametrize("segment_length", [PROMPT, PROMPT + 1])
def test_a_segment_that_is_full_when_a_loop_begins_leaves_before_its_first_pass(
    segment_length: int, client: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 5)
    config = tiny_config(model, segment_length=segment_length)
    weights = random_weights(model, config)
    found = []
    for devices in (set(), {"cpu", "cuda"}):
        monkeypatch.setattr(loops, "DEVICES", devices)
        with torch.inference_mode(), attach(model, client, config, weights) as memory:
            memory.new_documents([f"{len(devices)} {row}" for row in range(BATCH)])
            found.append(_decode(model, tokens, DynamicCache(config=model.config)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("everywhere")
def test_what_waits_does_not_leave_by_a_loop_that_only_reads(client: MemoryClient) -> None:
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 5)
    config = tiny_config(model, segment_length=PROMPT + 1)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        past = DynamicCache(config=model.config)
        _decode(model, tokens[:, : PROMPT + 1], past)
        memory.read_only = True
        _decode(model, tokens[:, PROMPT + 1 :], past, first=0)
        assert _passes(memory)
        assert memory.stats.appended_rows == 0


@pytest.mark.usefixtures("everywhere")
def test_generating_goes_by_a_loop(client: MemoryClient) -> None:
    """With the mask that `generate` gives, and again for the next text."""
    model = tiny_model("llama")
    config = tiny_config(model)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        for _ in range(2):
            tokens = _tokens(PROMPT)
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
            assert _passes(memory) >= 9
        assert memory.stats.steps_without_memory == 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize("num_passes", [1, 2, 6])
def test_the_last_token_of_a_loop_can_be_taken_back(num_passes: int, context: int, client: MemoryClient) -> None:
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model, context=context, segment_length=64)
    end = PROMPT + 2 + num_passes
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        answers = []
        for is_cropped in (False, True):
            memory.new_documents([f"{is_cropped} {row}" for row in range(BATCH)])
            memory.read(_tokens(20, seed=4))
            past = DynamicCache(config=model.config)
            _decode(model, tokens[:, : end - 1], past)
            if is_cropped:
                model(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)
                past.crop(-1)
            answers.append(_decode(model, tokens[:, end - 1 :], past, first=0))
            memory.flush()
            assert len(_rows(client, config.memory, f"{is_cropped} 1")) == 20 + PROMPT + 12
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("everywhere")
def test_two_tokens_of_a_loop_cannot_be_taken_back(client: MemoryClient) -> None:
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        past = DynamicCache(config=model.config)
        _decode(model, tokens, past)
        past.crop(-2)
        with pytest.raises(AttachError, match="cropped"):
            model(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)
        memory.enabled = False
        model(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)


@pytest.mark.usefixtures("everywhere")
def test_rearranged_rows_are_seen_in_a_loop(client: MemoryClient) -> None:
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)):
        past = DynamicCache(config=model.config)
        _decode(model, tokens, past)
        past.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(AttachError, match="beam search"):
            model(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)


@pytest.mark.usefixtures("everywhere")
def test_what_another_appends_is_seen_by_the_next_pass(client: MemoryClient) -> None:
    """A loop sees what is there when a pass begins, whoever has put it there."""
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model, segment_length=64)
    names = [f"row {row}" for row in range(BATCH)]
    with (
        torch.inference_mode(),
        attach(model, client, config, random_weights(model, config), sequences=names) as memory,
    ):
        past = DynamicCache(config=model.config)
        _decode(model, tokens, past)
        assert _passes(memory)
        loop: Any = memory._loops.loop
        assert int((loop._entries[:, 0] >= 0).sum()) == 0
        client.session(config.memory, names).append(torch.randn(2 * BATCH, config.dim), [2] * BATCH)
        model(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)
        assert memory._loops.loop is loop
        assert int((loop._entries[:, 0] >= 0).sum()) == 3 * BATCH  # two hits, one of which has a neighbour


@pytest.mark.usefixtures("everywhere")
def test_a_dropped_memory_ends_a_loop(client: MemoryClient) -> None:
    """The passes go on without rows, and go on with a new memory."""
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        past = DynamicCache(config=model.config)
        _decode(model, tokens, past)
        assert _passes(memory)
        client.drop_memory(config.memory)
        model(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)
        assert memory.stats.steps_without_memory == 1
        model(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)
        assert memory.stats.steps_without_memory == 1


@pytest.mark.usefixtures("everywhere")
def test_a_closed_client_ends_a_loop() -> None:
    from model_client import MemoryClient as Client

    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model)
    with torch.inference_mode():
        client = Client(":memory:", device=torch.get_default_device().type)
        with attach(model, client, config, random_weights(model, config)) as memory:
            past = DynamicCache(config=model.config)
            _decode(model, tokens, past)
            assert _passes(memory)
            client.close()
            model(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)
            assert memory.stats.steps_without_memory == 1


@pytest.mark.usefixtures("everywhere")
def test_untrained_weights_change_nothing_in_a_loop(client: MemoryClient) -> None:
    for family in FAMILIES:
        model, tokens = tiny_model(family), _tokens(PROMPT + 8)
        with torch.inference_mode():
            expected = _decode(model, tokens, DynamicCache(config=model.config))
            with attach(model, client, tiny_config(model, memory=family)):
                found = _decode(model, tokens, DynamicCache(config=model.config))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), family


@pytest.mark.usefixtures("everywhere")
def test_a_key_that_is_no_number_finds_nothing(client: MemoryClient) -> None:
    """It is the row that has it that goes without; the others have what they had."""
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model)
    weights = random_weights(model, config)
    with torch.inference_mode(), attach(model, client, config, weights) as memory:
        memory.read(_tokens(20, seed=4))
        past = DynamicCache(config=model.config)
        _decode(model, tokens, past)
        states = model.get_input_embeddings()(tokens[:, :1]).clone()
        states[0] = float("nan")
        model(inputs_embeds=states, past_key_values=past, use_cache=True)
        loop: Any = memory._loops.loop
        assert (loop._entries[:, 0] >= 0).any(dim=1).tolist() == [False, True]


def test_a_loop_that_cannot_be_made_is_no_trouble(client: MemoryClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be recorded passes are of their own, and that is said once."""

    def refused(*_: object) -> None:
        raise RuntimeError("nothing can be recorded")

    monkeypatch.setattr(loops, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr("integration.recorded.Recorder.record", refused)
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        _decode(model, tokens, DynamicCache(config=model.config))
        assert memory.stats.steps_with_memory == 13
        assert not memory._loops.loop


@pytest.mark.usefixtures("everywhere")
def test_an_engine_that_is_at_work_once_is_asked_again(client: MemoryClient, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        past = DynamicCache(config=model.config)
        with monkeypatch.context() as busy:
            busy.setattr(StandingStep, "enter", lambda *_: False)
            _decode(model, tokens[:, : PROMPT + 2], past)
        _decode(model, tokens[:, PROMPT + 2 :], past, first=0)
        assert _passes(memory)
        assert memory.stats.steps_without_memory == 0


@pytest.mark.usefixtures("everywhere")
def test_a_pass_waits_for_an_engine_no_longer_than_for_an_answer(
    client: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    def enter(self: StandingStep, timeout_s: float) -> bool:
        waits.append(timeout_s)
        return self._enter(timeout_s)

    def impatient(weights: MemoryWeights, config: MemoryConfig, *others: Any) -> DecodeLoop:
        return DecodeLoop(weights, replace(config, deadline_s=0.01), *others)

    monkeypatch.setattr(StandingStep, "enter", enter)
    monkeypatch.setattr(loops, "DecodeLoop", impatient)  # steps of their own have time
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 4)
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)):
        _decode(model, tokens, DynamicCache(config=model.config))
    assert max(waits) <= 0.01


@pytest.mark.usefixtures("everywhere")
def test_an_end_that_cannot_be_followed_leaves_neither_loop_nor_sequences(client: MemoryClient) -> None:
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model)
    attached = attach(model, client, config, random_weights(model, config))
    past = DynamicCache(config=model.config)
    with torch.inference_mode(), pytest.raises(AttachError, match="cropped"), attached:
        _decode(model, tokens, past)
        past.crop(-2)
    assert not attached._loops._loops
    assert client.describe_memory(config.memory).status.num_sequences == 0


def test_what_fails_while_it_is_recorded_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its kernels would go on in memory that is another's by then."""
    stream = Mock(device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    recorder = Recorder(torch.device("cpu"))
    recorder.stream = stream
    with pytest.raises(RuntimeError, match="no room"), recorder.at_work():
        raise RuntimeError("no room")
    stream.synchronize.assert_called_once()


def test_a_recording_that_another_has_spoilt_is_tried_again(
    client: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = torch.AcceleratorError("operation would make the legacy stream depend on a capturing blocking stream")
    spoilt.error_code = 906
    monkeypatch.setattr(loops, "DEVICES", {"cpu", "cuda"})
    model, tokens = tiny_model("llama"), _tokens(PROMPT + 12)
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        past = DynamicCache(config=model.config)
        with monkeypatch.context() as busy:
            busy.setattr(Recorder, "record", Mock(side_effect=spoilt))
            _decode(model, tokens[:, : PROMPT + 2], past)
        _decode(model, tokens[:, PROMPT + 2 :], past, first=0)
        assert _passes(memory)
