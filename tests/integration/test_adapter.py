"""Adapter folders and memory configurations: there and back, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import random_weights, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from integration.adapter import AdapterError, load_adapter, save_adapter
from integration.config import ConfigError, MemoryConfig
from integration.families import find_decoder
from integration.weights import MemoryWeights

if TYPE_CHECKING:
    from pathlib import Path


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = tiny_config(model, attention_layers=(2,), deadline_s=1.5)
    weights = random_weights(model, config)
    save_adapter(tmp_path, config, weights)
    loaded = load_adapter(tmp_path)
    assert loaded.config == config
    assert loaded.lora is None
    assert not loaded.weights.training
    assert loaded.weights.state_dict().keys() == weights.state_dict().keys()
    for name, tensor in weights.state_dict().items():
        assert torch.equal(loaded.weights.state_dict()[name], tensor)


def test_number_formats_are_chosen_at_both_ends(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = tiny_config(model)
    save_adapter(tmp_path, config, random_weights(model, config), dtype=torch.float16)
    assert next(load_adapter(tmp_path).weights.parameters()).dtype == torch.float32  # half precision is slow on a CPU
    assert next(load_adapter(tmp_path, dtype=torch.float16).weights.parameters()).dtype == torch.float16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter, to be spoilt."""
    model = tiny_model("llama")
    config = tiny_config(model)
    save_adapter(tmp_path, config, random_weights(model, config))
    return tmp_path


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "memory_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_or_broken_file_is_named(folder: Path) -> None:
    (folder / "memory.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match=r"memory.safetensors: cannot be read"):
        load_adapter(folder)
    (folder / "memory_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"memory_config.json: no adapter here"):
        load_adapter(folder)
    with pytest.raises(AdapterError, match="no adapter here"):
        load_adapter(folder / "elsewhere")


def test_another_format_version_is_refused(folder: Path) -> None:
    _edit(folder, format_version=2)
    with pytest.raises(AdapterError, match="format_version 2 given, 1 is supported"):
        load_adapter(folder)


def test_tensors_of_another_shape_are_named(folder: Path) -> None:
    path = folder / "memory.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "projection.linear.bias": torch.zeros(3)}, path)
    with pytest.raises(AdapterError, match=r"projection.linear.bias: shape \(3,\) given, \(8,\) needed"):
        load_adapter(folder)
    del tensors["projection.linear.bias"]
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"projection.linear.bias: shape None given"):
        load_adapter(folder)


def test_an_unknown_field_is_named(folder: Path) -> None:
    described = json.loads((folder / "memory_config.json").read_text())
    _edit(folder, memory={**described["memory"], "colour": "red"})
    with pytest.raises(ConfigError, match="colour"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1025}, "top_k"),
        ({"before": -1}, "before"),
        ({"after": 65}, "after"),
        ({"context": 0}, "context"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"attention_layers": ()}, "attention_layers"),
        ({"attention_layers": (2, 1)}, "attention_layers"),
        ({"attention_layers": (0,)}, "attention_layers"),
        ({"attention_layers": (1, 3)}, "attention_layers"),
        ({"dtype": "int4"}, "dtype"),
        ({"metric": "hamming"}, "metric"),
        ({"index": "ivf"}, "index"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"hidden_size": 33}, "hidden_size"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        MemoryConfig.for_model(tiny_model("llama"), **changes)


def test_configurations_survive_json() -> None:
    config = tiny_config(tiny_model("llama"), before=1, null_slot=False)
    assert MemoryConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="not JSON"):
        MemoryConfig.from_json("{")
    with pytest.raises(ConfigError, match="missing"):
        MemoryConfig.from_json("{}")


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gptj", "gpt_neox", "phi3"])
def test_queries_begin_as_the_models_own(family: str) -> None:
    """The copied projection gives the first rows of each family's own query, before any rotation."""
    model = tiny_model(family)
    config = tiny_config(model)
    layer = config.attention_layers[0]
    states = torch.randn(5, config.hidden_size)
    own = MemoryWeights.for_model(model, config).cache_attention(layer).q_proj(states)
    attention: Any = find_decoder(model).attention(layer)
    if family == "gpt_neox":
        expected = attention.query_key_value(states).view(5, 4, 3 * 8)[..., :8].flatten(1)
    elif family == "phi3":
        expected = attention.qkv_proj(states)[:, :32]
    else:
        expected = attention.q_proj(states)
    torch.testing.assert_close(own, expected)
