"""Reading: documents streamed through a trained variant with memstore's own service in process, token losses kept."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from benchmarks.quality.memorizing import MemorizingWeights
from benchmarks.quality.network import fuse_norms, run_layers
from integration import attach, load_adapter
from integration.training.judge import autocast
from model_client import MemoryClient, Retrieval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEADLINE_S = 120.0


@dataclass(slots=True, kw_only=True)
class Reading:
    """losses: (documents, tokens) float32 nats. seconds: of the pass. reserved_bytes: of the memory, 0 for none.

    is_right: (documents, tokens) bool, where the token was the likeliest one.
    """

    losses: np.ndarray
    seconds: float
    reserved_bytes: int = 0
    is_right: np.ndarray | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def per_document(self) -> np.ndarray:
        """(documents,) mean nats."""
        return self.losses.mean(axis=1, dtype=np.float64)


@dataclass(slots=True)
class Variant:
    """A trained variant, loaded. report: what its training wrote. adapter: None for lora and mt."""

    model: Any
    report: dict[str, Any]
    adapter: Any = None
    memorizing: MemorizingWeights | None = None

    @classmethod
    def load(cls, base: Path, folder: Path | None) -> Variant:
        """The base with what is in `folder`, LoRA merged; the bare base where that is None."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).to(device).eval()
        if folder is None:
            fuse_norms(model)
            return cls(model, {"kind": "base", "segment": 512})
        report = json.loads((folder / "report.json").read_text())
        adapter = memorizing = None
        if report["kind"] == "memory":
            adapter = load_adapter(folder, device=device, dtype=torch.float32)
            model = adapter.apply_lora(model)
        elif (folder / "lora").is_dir():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(folder / "lora")).merge_and_unload()
        fuse_norms(model)
        model.requires_grad_(False).eval()
        if report["kind"] == "mt":
            attention = model.model.layers[report["layer"]].self_attn
            memorizing = MemorizingWeights(attention, report.get("init", "model"))
            memorizing.load_state_dict(torch.load(folder / "mt.pt", map_location=device, weights_only=True))
            memorizing.to(device).eval()
        return cls(model, report, adapter, memorizing)


def nats(model: Any, part: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (batch, length) float32 of windows (batch, length + 1), and where the token was the likeliest."""
    with autocast(part.device):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
    flat = functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="none")
    return flat.view(part.shape[0], -1), logits.argmax(dim=-1) == part[:, 1:]


@torch.no_grad()
def read(
    variant: Variant,
    windows: np.ndarray,
    *,
    capacity: int = 0,
    client: MemoryClient | None = None,
    other: bool = False,
    segment: int = 0,
    changes: dict[str, Any] | None = None,
    watch: Callable[[int, Any], None] | None = None,
) -> Reading:
    """Reads all documents (documents, length + 1) in lockstep, segment by segment.

    capacity: entries of each document, 0 for no memory. other: each document reads the memory of the one before it,
    and fills its own. changes: of the memory's configuration. watch: told first token and trace of each segment.
    """
    device = next(variant.model.parameters()).device
    on_device = torch.from_numpy(windows).to(device)
    length = windows.shape[1] - 1
    segment = segment or int(variant.report["segment"])
    kept: list[tuple[Tensor, Tensor]] = []
    with _memory(variant, client, capacity, len(windows), changes or {}) as memory:
        if watch is not None:
            memory.is_tracing = True
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for begin in range(0, length, segment):
            part = on_device[:, begin : begin + segment + 1]
            if other and memory is not None:
                names = memory.sequences
                with memory.reading(names[1:] + names[:1]):
                    kept.append(nats(variant.model, part))
                nats(variant.model, part)
            else:
                kept.append(nats(variant.model, part))
            if watch is not None:
                watch(begin, memory.last_trace)
        losses, is_right = (torch.cat(each, dim=1).cpu().numpy() for each in zip(*kept, strict=True))
        seconds = time.perf_counter() - begun
        reserved = 0 if memory is None or client is None else _reserved(client, memory.name)
        if memory is not None and memory.failures:
            raise RuntimeError(f"{memory.failures} steps went without their memory")
    return Reading(losses=losses, seconds=seconds, reserved_bytes=reserved, is_right=is_right)


@contextlib.contextmanager
def _memory(
    variant: Variant, client: MemoryClient | None, capacity: int, rows: int, changes: dict[str, Any]
) -> Iterator[Any]:
    """What the variant reads from, made for this pass and dropped after it; None for no memory."""
    if capacity == 0 or client is None:
        yield None
        return
    name, names = f"quality-{uuid.uuid4().hex[:8]}", [f"document-{row}" for row in range(rows)]
    if variant.memorizing is not None:
        memory: Any = MemorizingMemory(variant, client, name, names, capacity)
        with memory:
            yield memory
    else:
        config = variant.adapter.config.with_changes(
            memory=name, capacity=capacity, max_sequences=rows, deadline_s=DEADLINE_S, **changes
        )
        with attach(variant.model, client, config, variant.adapter.weights, sequences=names) as attached:
            yield AttachedReader(attached, name)
    client.drop_memory(name)


class AttachedReader:
    """An attached memory, by the names that `read` uses."""

    def __init__(self, attached: Any, name: str) -> None:
        self._attached, self.name = attached, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attached, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_attached", "name"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._attached, name, value)

    @property
    def failures(self) -> int:
        """Steps without rows."""
        return int(self._attached.stats.steps_without_memory)


class MemorizingMemory:
    """Memorizing Transformers on the store: one layer of rings for each head, a key and a value for each token."""

    def __init__(self, variant: Variant, client: MemoryClient, name: str, names: list[str], capacity: int) -> None:
        own = variant.memorizing
        assert own is not None
        self.name, self._own, self._names, self._client = name, own, names, client
        self._layer = variant.model.model.layers[variant.report["layer"]].self_attn
        self._top_k = int(variant.report["top_k"])
        self._length = 0
        payloads = {"value": (torch.bfloat16, (own.head_dim,))}
        client.create_memory(
            name, dim=own.head_dim, num_layers=own.num_heads, capacity=capacity, max_sequences=len(names),
            dtype=torch.bfloat16, metric="ip", payloads=payloads,
        )  # fmt: skip
        self._session = client.session(name, names)
        self._found: Any = None
        self._handles: list[Any] = []
        self.failures = 0

    def __enter__(self) -> MemorizingMemory:
        self._handles = [
            self._layer.register_forward_pre_hook(self._look_up, with_kwargs=True),
            self._layer.o_proj.register_forward_pre_hook(self._mix),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look_up(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        batch, length = states.shape[:2]
        queries, keys, values = (each.flatten(0, 1).to(torch.bfloat16) for each in self._own.states(states, attention))
        counts = [length] * batch
        self._found = None
        if self._length:
            wanted = Retrieval(top_k=self._top_k, arrays=("key", "value"), scores=False)
            stacked = queries.transpose(0, 1).contiguous()
            hits = self._session.retrieve(stacked, counts, wanted, deadline_s=DEADLINE_S).hits
            self._found = (queries, hits)
        stored = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
        self._session.append(stored[0], counts, payloads={"value": stored[1]}, deadline_s=DEADLINE_S)
        self._length += length

    def _mix(self, _: Any, args: tuple[Any, ...]) -> Any:
        if self._found is None:
            return None
        (queries, hits), local = self._found, args[0]
        index = hits.index[..., 0].permute(1, 0, 2).long()
        safe = index.clamp_min(0)
        read = self._own.attend(queries, hits.rows["key"][safe], hits.rows["value"][safe], index >= 0)
        return (self._own.mix(local, read.view(local.shape), torch.ones_like(local[..., :1])),)


def _reserved(client: MemoryClient, name: str) -> int:
    description = client.describe_memory(name)
    return int(getattr(description, "reserved_bytes", 0))


@torch.no_grad()
def states_at(variant: Variant, windows: np.ndarray, layer: int, segment: int = 512) -> Tensor:
    """(documents, length, hidden_size) states that enter a layer, float32, read without a memory."""
    device = next(variant.model.parameters()).device
    found: list[Tensor] = []

    def keep(number: int, hidden: Tensor) -> None:
        if number == layer:
            found.append(hidden.float())

    for begin in range(0, windows.shape[1] - 1, segment):
        part = torch.from_numpy(windows[:, begin : begin + segment]).to(device)
        with autocast(device):
            run_layers(variant.model.model, part, keep)
    return torch.cat(found, dim=1)[:, : windows.shape[1] - 1]
