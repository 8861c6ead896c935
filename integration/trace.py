"""What a model read in its memory, for those who want to look, and what reading cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

from torch.nn import functional

if TYPE_CHECKING:
    import torch

    from integration.forward import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTrace:
    """The reading of one forward, on the host.

    counts: tokens of each batch row; the tokens of all rows lie one behind the other.
    positions: (tokens, entries) int64 within the sequence, -1 for an empty slot.
    mass: (tokens, entries) float32, share of attention on each entry in the last cache attention, averaged over its
    heads; what is missing to 1 went to the null slot.
    """

    counts: tuple[int, ...]
    positions: torch.Tensor
    mass: torch.Tensor

    @classmethod
    def of(cls, answer: Answer, counts: tuple[int, ...], mass: torch.Tensor) -> Self:
        """What a pass has read of an answer. mass: on any device."""
        padded = functional.pad(answer.positions, (1, 0), value=-1)
        positions = padded[(answer.entries + 1).long()]
        return cls(counts=counts, positions=positions.cpu(), mass=mass.detach().float().cpu())


@dataclass(slots=True, kw_only=True)
class MemoryStats:
    """Counters of one attached memory; only ever grow.

    steps_with_memory, steps_without_memory: forwards that had their rows, and forwards that went on with their local
    context only. late: of the latter, those whose rows came after the deadline. failures: calls that failed, late
    ones included. appended_rows, lost_rows: rows given to the memory, and rows whose append failed.
    waited_s: seconds that the model stood still for its memory.
    """

    steps_with_memory: int = 0
    steps_without_memory: int = 0
    late: int = 0
    failures: int = 0
    appended_rows: int = 0
    lost_rows: int = 0
    waited_s: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """The counters by name."""
        return asdict(self)
