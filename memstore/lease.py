"""Lease: sequences that another process has the sole right to change, and what is known of them meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.control import ControlBlock, Progress

RECALL_S = 0.02
"""How long a process that is asked for its lease needs, as a rule."""


@dataclass(slots=True, eq=False, kw_only=True)
class Lease:
    """The right of one writer to the sequences `names`, from the server's point of view.

    recall: asks the holder to give it back; on_end: tells that it has ended. Both are called in the device thread.
    """

    number: int
    writer: str
    names: tuple[str, ...]
    block: ControlBlock
    recall: Callable[[int], None]
    on_end: Callable[[], None]
    is_recalled: bool = False

    def ask_back(self) -> None:
        """Recalls it, once."""
        if not self.is_recalled:
            self.is_recalled = True
            self.recall(self.number)


@dataclass(slots=True, eq=False)
class Loan:
    """One sequence of a lease. epoch, num_live: as they were when it was lent."""

    lease: Lease
    index: int
    epoch: int
    num_live: int

    def progress(self) -> Progress:
        """How far the holder says it has written. Raises Corrupt."""
        return self.lease.block.progress(self.index)
