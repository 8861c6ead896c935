"""Adapter: what was learned beside a model, as a folder.

memory_config.json     format version and MemoryConfig
memory.safetensors     the tensors of MemoryWeights
lora/                  a peft adapter, where LoRA was trained too
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from integration.config import MemoryConfig
from integration.families import find_decoder
from integration.weights import MemoryWeights

if TYPE_CHECKING:
    from torch import nn

FORMAT_VERSION = 1
CONFIG_FILE = "memory_config.json"
WEIGHTS_FILE = "memory.safetensors"
LORA_FOLDER = "lora"
LORA_FILE = "adapter_model.safetensors"


class AdapterError(ValueError):
    """A folder that holds no adapter, or one that cannot be used; the message names the file and the problem."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter. lora: folder of its peft part, None where it has none."""

    config: MemoryConfig
    weights: MemoryWeights
    lora: Path | None = None

    def apply_lora(self, model: nn.Module) -> nn.Module:
        """The model with the LoRA part merged into its weights, in place; the model itself where there is none."""
        if self.lora is None:
            return model
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # of peft's to transformers
            merged: nn.Module = PeftModel.from_pretrained(model, str(self.lora)).merge_and_unload()
        return merged

    @property
    def lora_parameters(self) -> int:
        """How many numbers the LoRA part has; 0 where there is none."""
        return 0 if self.lora is None else sum(each.numel() for each in _read_tensors(self.lora / LORA_FILE).values())


def save_adapter(
    folder: Path | str,
    config: MemoryConfig,
    weights: MemoryWeights,
    *,
    lora_model: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes an adapter folder, over what it held. dtype: of the saved tensors, theirs by default.

    lora_model: a peft model whose adapter is saved as well.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved = config.with_changes(training_payload=False)
    described = {"format_version": FORMAT_VERSION, "memory": json.loads(saved.to_json())}
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.state_dict().items()}
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)  # safetensors keeps its files to the owner
    if lora_model is not None:
        lora_model.save_pretrained(str(folder / LORA_FOLDER))


def load_adapter(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Adapter:
    """Reads an adapter folder. Raises AdapterError or ConfigError.

    dtype: of the weights. By default float32 on a CPU, where products of half precision are slow, elsewhere as saved.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else next(iter(tensors.values())).dtype
    with torch.device("meta"):  # takes no memory, whatever sizes the configuration has
        _check_shapes(folder / WEIGHTS_FILE, MemoryWeights(config, dtype=dtype), tensors)
    weights = MemoryWeights(config, dtype=dtype)
    weights.load_state_dict(tensors)
    lora = folder / LORA_FOLDER
    return Adapter(config, weights.to(device).eval(), lora if lora.is_dir() else None)


def add_lora(model: nn.Module, rank: int) -> Any:
    """The model wrapped by peft with LoRA of this rank on its feed-forward parts, from the first layer to the last."""
    from peft import LoraConfig, get_peft_model

    targets = find_decoder(model).family.feed_forward
    if not targets:
        raise AdapterError("LoRA: the feed-forward parts of this family are no linear layers")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)))


def _read_config(path: Path) -> MemoryConfig:
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: no adapter here: {error}") from error
    version = described.get("format_version") if isinstance(described, dict) else None
    if version != FORMAT_VERSION:
        raise AdapterError(f"{path}: format_version {version!r} given, {FORMAT_VERSION} is supported")
    return MemoryConfig.from_json(json.dumps(described.get("memory")))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    if not tensors:
        raise AdapterError(f"{path}: holds no tensors")
    return tensors


def _check_shapes(path: Path, weights: MemoryWeights, tensors: dict[str, torch.Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in weights.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(set(wanted) | set(given)):
        if wanted.get(name) != given.get(name):
            problem = f"{name}: shape {given.get(name)} given, {wanted.get(name)} needed by {CONFIG_FILE}"
            raise AdapterError(f"{path}: {problem}")
