"""What the demo found, as numbers: `report.json`, and the lines that a terminal shows."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from integration.demo.reading import Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of the demo.

    Perplexities are per token; retrieval_share is of wall time. steps_without_memory: segments whose rows did not
    come, in both passes that read a memory. lora_parameters: those merged into the model, in every pass.
    """

    text: str
    other_text: str
    tokens: int
    bytes: int
    perplexity_memory: float
    perplexity_none: float
    perplexity_other_document: float
    bits_per_byte_memory: float
    bits_per_byte_none: float
    tokens_per_s: float
    tokens_per_s_none: float
    retrieval_share: float
    transport: str
    steps_without_memory: int
    memory: dict[str, int | str]
    model_parameters: int
    memory_parameters: int
    lora_parameters: int
    machine: str

    @property
    def gain(self) -> float:
        """The share by which memory lowers perplexity; negative where it raises it."""
        return 1 - self.perplexity_memory / self.perplexity_none

    def as_dict(self) -> dict[str, Any]:
        """Every field, and the gain, as plain values."""
        return asdict(self) | {"perplexity_gain": self.gain}

    def write(self, file: Path) -> None:
        """Writes `as_dict` as JSON."""
        file.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """A table for a terminal."""
        change = {name: value / self.perplexity_none - 1 for name, value in self._perplexities().items()}
        table = [f"  {name:<34}{value:>10.3f}{change[name]:>+10.1%}" for name, value in self._perplexities().items()]
        speeds = f"{self.tokens_per_s:,.0f} tokens/s with memory over {self.transport}, {self.tokens_per_s_none:,.0f}"
        return [
            f"{self.tokens:,} tokens, {self.bytes:,} bytes of {self.text}",
            f"  {'':<34}{'perplexity':>10}{'change':>10}",
            *table,
            f"  bits per byte: {self.bits_per_byte_memory:.4f} with memory, {self.bits_per_byte_none:.4f} without",
            f"  {speeds} without; {self.retrieval_share:.1%} of the time waiting for retrieval",
            *self._warnings(),
        ]

    def _warnings(self) -> list[str]:
        lost = self.steps_without_memory
        return [f"  {lost} segments were read without their memory: these figures are spoiled"] if lost else []

    def _perplexities(self) -> dict[str, float]:
        return {
            "without memory": self.perplexity_none,
            "with its own memory": self.perplexity_memory,
            "with another document's memory": self.perplexity_other_document,
        }


@dataclass(frozen=True, slots=True)
class Readings:
    """The three passes over the same tokens."""

    none: Reading
    memory: Reading
    other: Reading


def machine(device: str) -> str:
    """What the model ran on, without the host's name: processor, cores, accelerator, versions."""
    parts = [_processor(), f"{os.cpu_count()} cores"]
    if device.startswith("cuda"):
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join([*parts, f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.system()} {platform.machine()}"
