"""What is trained, by name: the variants of a table differ from `ours` in what it asks about, and in nothing else."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.network import NetworkSpec
from integration.config import MemoryConfig

OURS: dict[str, Any] = {
    "retrieval_layer": 7,
    "attention_layers": (7,),
    "dim": 256,
    "top_k": 16,
    "after": 2,
    "context": 2,
    "init": "model",
}

MT: dict[str, Any] = {"kind": "mt", "top_k": 32, "retrieval_layer": 6, "attention_layers": (6, 7)}

VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "lora": {"kind": "lora"},
    "lora-1024": {"kind": "lora", "segment": 1024},
    "mt": MT,
    "mt-unit": MT | {"init": "unit"},
    "heads": {"kind": "heads"},
    "init-plain": {"init": "plain"},
    "init-similar": {"init": "similar"},
    "entries-64k": {"capacity": 65_536},
    "top-32": {"top_k": 32},
    "top-8": {"top_k": 8},
    "top-4": {"top_k": 4},
    "dim-128": {"dim": 128},
    "dim-64": {"dim": 64},
    "dim-32": {"dim": 32},
    "dim-16": {"dim": 16},
    "pca-fixed": {"fixed_projection": True},
    "random-fixed": {"fixed_projection": True, "projection": "random"},
    "store-6-read-6": {"retrieval_layer": 6, "attention_layers": (6,)},
    "store-6-read-7": {"retrieval_layer": 6, "attention_layers": (7,)},
    "store-6-read-6-7": {"retrieval_layer": 6, "attention_layers": (6, 7)},
    "store-4-read-4-7": {"retrieval_layer": 4, "attention_layers": (4, 5, 6, 7)},
    "store-4-read-6-7": {"retrieval_layer": 4, "attention_layers": (6, 7)},
    "store-2-read-2-7": {"retrieval_layer": 2, "attention_layers": (2, 3, 4, 5, 6, 7)},
    **{
        f"w{window}-c{context}": {"after": window, "context": context + 1}
        for window in (0, 1, 2, 4)
        for context in (0, 1, 2, 4)
    },
}
"""name -> changes. wN: neighbours after each hit. cN: tokens before it whose hits a token reads as well."""


def spec_of(name: str, base: dict[str, Any], shape: Any) -> tuple[NetworkSpec, int]:
    """The spec of a variant, and its segment. base: changes beyond its own. shape: the model's configuration."""
    changes = OURS | VARIANTS[name] | base
    segment = changes.pop("segment", 512)
    names = ("kind", "init", "projection", "fixed_projection", "lora_rank")
    own = {key: changes.pop(key) for key in names if key in changes}
    sizes = {
        "hidden_size": shape.hidden_size,
        "num_heads": shape.num_attention_heads,
        "num_kv_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
    }
    config = MemoryConfig(memory="quality", segment_length=segment, **(sizes | changes))
    return NetworkSpec(kind=own.pop("kind", "memory"), config=config, **own), segment
