"""Training through a memory: gradients, checkpointing, and the adaptation loop."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from models import FAMILIES, VOCABULARY, random_weights, tiny_config, tiny_model

from integration.adapter import load_adapter
from integration.attach import attach
from integration.store import MemoryLink
from integration.training.adapt import AdaptOptions, adapt
from integration.training.documents import Documents, Streams, read_texts

if TYPE_CHECKING:
    from pathlib import Path

    from model_client import MemoryClient

SEGMENT = 16

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name of older versions


def _text(segments: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    part = torch.randint(3, VOCABULARY, (2, 11), generator=generator, device="cpu").to(torch.get_default_device())
    return part.repeat(1, 9)[:, : segments * SEGMENT + 1]


def _gradients(
    family: str, client: MemoryClient, checkpointing: dict[str, Any] | None, *, backward_at_the_end: bool = False
) -> dict[str, torch.Tensor]:
    """The loss and all gradients after three segments, the last two with something to remember."""
    model = tiny_model(family)
    model.requires_grad_(False)
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.get_input_embeddings().weight.requires_grad_()
    name = f"gradients-{checkpointing}-{backward_at_the_end}"
    config = tiny_config(model, memory=name.translate({ord(c): "." for c in "{}': "}))
    config = config.with_changes(training_payload=True)
    weights = random_weights(model, config).train()
    total = torch.zeros(())
    with attach(model, client, config, weights) as memory:
        for begin in range(0, 3 * SEGMENT, SEGMENT):
            part = _text()[:, begin : begin + SEGMENT]
            loss = model(input_ids=part, labels=part, use_cache=False).loss
            if not backward_at_the_end:
                loss.backward()
                loss = loss.detach()
            total = total + loss
        if backward_at_the_end:
            total.backward()
        assert memory.stats.steps_with_memory == 3
        assert memory.stats.appended_rows == 2 * 3 * SEGMENT
    assert client.describe_memory(config.memory).status.appended_rows == 2 * 3 * SEGMENT
    found = {name: parameter.grad for name, parameter in weights.named_parameters() if parameter.grad is not None}
    return {"loss": total.detach(), **found}


def _check_checkpointed(family: str, client: MemoryClient, *, backward_at_the_end: bool) -> None:
    """Whichever kind of checkpointing, no gradient is another than without."""
    plain = _gradients(family, client, None)
    for reentrant in (True, False):
        kind = {"use_reentrant": reentrant}
        again = _gradients(family, client, kind, backward_at_the_end=backward_at_the_end)
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            told = f"{name} with {kind}"
            torch.testing.assert_close(
                again[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, told=told: f"{told}: {text}"
            )


@pytest.mark.parametrize("family", ["llama", "opt", "gptj", "gpt_neox"])
@pytest.mark.usefixtures("each_device")
def test_checkpointing_changes_no_gradient_and_appends_once(family: str, client: MemoryClient) -> None:
    _check_checkpointed(family, client, backward_at_the_end=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("each_device")
def test_several_checkpointed_forwards_before_their_backward_each_have_their_own_answer(
    family: str, client: MemoryClient
) -> None:
    _check_checkpointed(family, client, backward_at_the_end=True)


@pytest.mark.usefixtures("each_device")
def test_every_weight_gets_a_gradient_the_projection_too(client: MemoryClient) -> None:
    found = _gradients("llama", client, None)
    assert {"projection.linear.weight", "projection.linear.bias"} <= found.keys()
    for name, gradient in found.items():
        assert gradient.abs().sum() > 0, name


def _repeating_documents() -> Documents:
    """Six documents of a random sentence each, over and over: all but the first time is to be had from the memory."""
    generator = np.random.default_rng(0)
    texts = [np.tile(generator.integers(3, VOCABULARY, 60), 6) for _ in range(6)]
    return Documents(np.concatenate(texts).astype(np.uint16), np.cumsum([0, *(len(text) for text in texts)]))


def test_adaptation_learns_to_remember_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = tiny_config(model, dim=16, capacity=256)
    options = AdaptOptions(
        steps=60,
        batch=4,
        segment=SEGMENT,
        evaluations=2,
        judge_rows=4,
        judge_segments=12,
        rate=1e-2,
        warmup=5,
        log_every=5,
    )
    report = adapt(model, config, _repeating_documents(), _repeating_documents(), tmp_path, options)
    assert report.steps == 60
    assert report.steps_without_memory == 0
    assert report.verdict is not None
    assert report.verdict.with_memory < 0.95 * report.verdict.without_memory
    assert report.verdict.with_memory < report.verdict.other_document
    assert json.loads((tmp_path / "report.json").read_text())["verdict"]["gain_ratio"] > 0.05
    assert load_adapter(tmp_path).config == config
    longer = AdaptOptions(**{**_as_dict(options), "steps": 70, "evaluations": 1})
    resumed = adapt(tiny_model("llama"), config, _repeating_documents(), None, tmp_path, longer, resume=True)
    assert resumed.steps == 70
    assert resumed.losses[: len(report.losses)] == report.losses
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1] == 70


def _as_dict(options: AdaptOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in AdaptOptions.__slots__}


def test_a_step_whose_memory_failed_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, begun = MemoryLink.start, list[bool]()

    def fail_once(link: MemoryLink, *args: Any, **kwargs: Any) -> Any:
        begun.append(True)
        return None if len(begun) == 2 else begin(link, *args, **kwargs)

    monkeypatch.setattr(MemoryLink, "start", fail_once)
    model = tiny_model("llama")
    options = AdaptOptions(steps=4, batch=2, segment=SEGMENT)
    report = adapt(model, tiny_config(model), _repeating_documents(), None, tmp_path, options)
    assert (report.steps, report.steps_without_memory) == (4, 1)


def test_adaptation_with_lora_saves_both_parts(tmp_path: Path) -> None:
    model = tiny_model("llama")
    options = AdaptOptions(steps=4, batch=2, segment=SEGMENT, lora_rank=2, judge_rows=2, judge_segments=3)
    adapt(model, tiny_config(model), _repeating_documents(), None, tmp_path, options)
    loaded = load_adapter(tmp_path)
    assert loaded.lora is not None
    fresh = tiny_model("llama")
    before = fresh.model.layers[0].mlp.up_proj.weight.clone()
    merged = loaded.apply_lora(fresh)
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, before)


def test_streams_read_every_document_in_order_and_tell_where_one_begins() -> None:
    documents = Documents(np.arange(200, dtype=np.uint16), np.array([0, 90, 95, 200]))
    streams = Streams(documents, batch=2, segment=8, max_segments=100, seed=0, device=torch.device("cpu"))
    last: list[int | None] = [None, None]
    begins = 0
    for _ in range(60):
        windows, begun = streams.next_batch()
        for row, window in enumerate(windows.tolist()):
            assert window == list(range(window[0], window[0] + 9))
            assert (last[row] == window[0]) == (row not in begun)
            assert not window[0] <= 90 <= window[-1] - 1
            last[row] = window[-1]
        begins += len(begun)
    assert begins > 4


def test_streams_go_on_from_their_state() -> None:
    documents = _repeating_documents()
    settings = {"batch": 3, "segment": 8, "max_segments": 10, "device": torch.device("cpu")}
    streams = Streams(documents, seed=0, **settings)
    for _ in range(20):
        streams.next_batch()
    again = Streams(documents, seed=7, **settings)
    again.resume(json.loads(json.dumps(streams.state())))
    for _ in range(20):
        windows, begun = streams.next_batch()
        others, others_begun = again.next_batch()
        assert torch.equal(windows, others)
        assert begun == others_begun


def test_streams_want_two_segments() -> None:
    documents = Documents(np.arange(16, dtype=np.uint16), np.array([0, 16]))
    with pytest.raises(ValueError, match="no document has 17 tokens"):
        Streams(documents, batch=1, segment=8, max_segments=4, seed=0, device=torch.device("cpu"))


def test_texts_come_from_lines_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "b.py").write_text("b")
    (tmp_path / "code" / "a.py").write_text("a")
    (tmp_path / "code" / "image.png").write_bytes(b"\x89")
    assert list(read_texts(tmp_path / "lines.jsonl")) == ["one", "two"]
    assert list(read_texts(tmp_path / "code")) == ["a\nb"]
    assert list(read_texts(tmp_path / "code" / "a.py")) == ["a"]
