"""MemoryConfig: what a model keeps of its past, where it looks it up, and which layers read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from integration.families import find_decoder
from model_client.cache_attention import CacheAttentionSizes

if TYPE_CHECKING:
    from torch import nn

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METRICS = ("l2", "ip", "cosine")
MAX_WIDTH = 65_536
"""Of a hidden state, and of whatever is cut out of one: no model is so wide."""
HIDDEN = "hidden"
"""Name of the payload array with whole hidden states."""
INDEXES = ("exact", "faiss_flat", "faiss_ivf_flat", "faiss_ivf_pq", "faiss_cagra")


class ConfigError(ValueError):
    """A memory configuration that cannot work; the message names the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """How one model uses one memory. Checked when made; raises ConfigError.

    memory: name of the memory at the server.
    retrieval_layer: hidden states that enter this decoder layer are projected, looked up and kept.
    attention_layers: layers with cache attention, ascending, none before the retrieval layer. A gap between the two
    lets the layers in it hide the retrieval.
    hidden_size, num_heads, num_kv_heads, head_dim: of the cache attention; those of the model, by default.
    dim: width of a key. top_k: hits a token. before, after: neighbours given with each hit, by position.
    context: a token reads its own hits and those of the `context - 1` tokens before it.
    capacity: entries of one sequence; the oldest leave. max_sequences: sequences that the memory has room for.
    segment_length: rows that wait beside the model's key-value cache before they are appended.
    dtype: of the kept keys. metric, index: how keys are compared and found.
    deadline_s: what a forward waits for its rows at most, from the start of the retrieval; then it goes on without.
    A decode loop makes its retrievals itself: it waits so long for the engine at most, and then they are a part of it.
    null_slot: gives each head a way to attend to nothing.
    training_payload: keeps the whole hidden state beside each key, so that training reaches the projection.
    """

    memory: str
    retrieval_layer: int
    attention_layers: tuple[int, ...]
    hidden_size: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    top_k: int = 16
    before: int = 0
    after: int = 1
    context: int = 2
    capacity: int = 16_384
    max_sequences: int = 8
    segment_length: int = 512
    dtype: str = "fp16"
    metric: str = "l2"
    index: str = "exact"
    deadline_s: float = 2.0
    null_slot: bool = True
    training_payload: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention_layers", tuple(self.attention_layers))
        counts = ("hidden_size", "dim", "num_heads", "num_kv_heads", "head_dim", "top_k", "context", "capacity")
        for name in (*counts, "max_sequences", "segment_length", "before", "after", "retrieval_layer"):
            value = getattr(self, name)
            _demand(type(value) is int, name, f"{value!r} given, a whole number needed")
        for name in (*counts, "max_sequences", "segment_length"):
            _demand(getattr(self, name) >= 1, name, f"{getattr(self, name)} given, at least 1 needed")
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            _demand(value <= MAX_WIDTH, name, f"{value} given, at most {MAX_WIDTH} allowed")
        for name in ("before", "after"):
            _demand(0 <= getattr(self, name) <= 64, name, f"{getattr(self, name)} given, 0 to 64 allowed")
        _demand(self.top_k <= 1024, "top_k", f"{self.top_k} given, at most 1024 allowed")
        _demand(self.context <= 1024, "context", f"{self.context} given, at most 1024 allowed")
        _demand(self.dim <= 8192, "dim", f"{self.dim} given, at most 8192 allowed")
        _demand(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"must divide num_heads ({self.num_heads})")
        _demand(self.deadline_s > 0, "deadline_s", "must be above 0")
        for name, allowed in (("dtype", tuple(DTYPES)), ("metric", METRICS), ("index", INDEXES)):
            _demand(getattr(self, name) in allowed, name, f"{getattr(self, name)!r} given, one of {allowed} needed")
        self._check_layers()

    def _check_layers(self) -> None:
        layers = self.attention_layers
        _demand(self.retrieval_layer >= 0, "retrieval_layer", "must be 0 or more")
        _demand(bool(layers), "attention_layers", "at least one layer needed")
        _demand(all(type(layer) is int for layer in layers), "attention_layers", f"{layers}: whole numbers needed")
        _demand(list(layers) == sorted(set(layers)), "attention_layers", f"{layers} must ascend without repeats")
        _demand(layers[0] >= self.retrieval_layer, "attention_layers", "none may come before retrieval_layer")

    @classmethod
    def for_model(cls, model: nn.Module, **changes: Any) -> Self:
        """A configuration that suits the model; `changes` override single fields.

        Retrieval at three quarters of the depth, cache attention in all layers above, keys a quarter as wide as a
        hidden state. Raises UnknownFamily where the model is of no supported family.
        """
        decoder = find_decoder(model)
        num_layers = len(decoder.layers)
        retrieval_layer = changes.get("retrieval_layer", max(0, min(3 * num_layers // 4, num_layers - 2)))
        first = min(retrieval_layer + 1, num_layers - 1)
        defaults: dict[str, Any] = {
            "memory": "memory",
            "retrieval_layer": retrieval_layer,
            "attention_layers": tuple(range(first, num_layers)),
            "hidden_size": decoder.hidden_size,
            "dim": max(8, -(-decoder.hidden_size // 32) * 8),
            "num_heads": decoder.num_heads,
            "num_kv_heads": decoder.num_kv_heads,
            "head_dim": decoder.head_dim,
        }
        config = cls(**(defaults | changes))
        config.check_model(model)
        return config

    def check_model(self, model: nn.Module) -> None:
        """Raises ConfigError where this was made for a model of another shape."""
        decoder = find_decoder(model)
        given = f"made for width {self.hidden_size}, the model has {decoder.hidden_size}"
        _demand(self.hidden_size == decoder.hidden_size, "hidden_size", given)
        last, depth = self.attention_layers[-1], len(decoder.layers)
        _demand(last < depth, "attention_layers", f"layer {last} named, the model has {depth} layers, from 0")

    @property
    def window(self) -> int:
        """Rows given with each hit, itself among them."""
        return self.before + 1 + self.after

    @property
    def sizes(self) -> CacheAttentionSizes:
        """The sizes of each cache attention."""
        return CacheAttentionSizes(
            hidden_size=self.hidden_size,
            dim=self.dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            context=self.context,
            window=self.window,
            null_slot=self.null_slot,
        )

    def with_changes(self, **changes: Any) -> Self:
        """The same with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """A JSON object of all fields, in their order."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of to_json. Raises ConfigError on anything else."""
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not JSON: {error}") from error
        _demand(isinstance(given, dict), "configuration", "must be a JSON object")
        unknown = sorted(set(given) - {each.name for each in fields(cls)})
        _demand(not unknown, "configuration", f"unknown fields {unknown}")
        try:
            return cls(**given)
        except TypeError as error:
            raise ConfigError(f"configuration: {error}") from error


def _demand(is_met: bool, field: str, problem: str) -> None:
    if not is_met:
        raise ConfigError(f"{field}: {problem}")
