"""What the demo found, as numbers: `report.json`, and the lines that a terminal shows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from integration.demo.reading import Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of the demo. Perplexities are per token; the share is of wall time; device is the model's."""

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

    @property
    def gain(self) -> float:
        """The share by which memory lowers perplexity; negative where it raises it."""
        return 1 - self.perplexity_memory / self.perplexity_none

    def write(self, file: Path) -> None:
        """Writes JSON with every field, and the gain."""
        file.write_text(json.dumps(asdict(self) | {"perplexity_gain": self.gain}, indent=2) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """A table for a terminal."""
        change = {name: value / self.perplexity_none - 1 for name, value in self._perplexities().items()}
        table = [f"  {name:<34}{value:>10.3f}{change[name]:>+10.1%}" for name, value in self._perplexities().items()]
        return [
            f"{self.tokens:,} tokens, {self.bytes:,} bytes of {self.text}",
            f"  {'':<34}{'perplexity':>10}{'change':>10}",
            *table,
            f"  bits per byte: {self.bits_per_byte_memory:.4f} with memory, {self.bits_per_byte_none:.4f} without",
            f"  {self.tokens_per_s:,.0f} tokens/s with memory over {self.transport}, {self.tokens_per_s_none:,.0f} without;"
            f" {self.retrieval_share:.1%} of the time waiting for retrieval",
        ]

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
