"""BatchSequences: the sequence that each row of a model's batch is, and the one that it reads."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from integration.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Sequence


class BatchSequences:
    """One sequence a row. Until they are named there are none.

    names: of the rows. is_new: of each row, whether its next append begins the sequence anew. made_up: names that
    nobody gave. sources: sequences that are read instead, for a time; None where each row reads its own.
    """

    def __init__(self, most: int) -> None:
        """most: sequences that the memory has room for."""
        self.names: tuple[str, ...] = ()
        self.is_new: list[bool] = []
        self.made_up: set[str] = set()
        self.sources: tuple[str, ...] | None = None
        self._most = most

    @property
    def read(self) -> tuple[str, ...]:
        """Names of those that are read."""
        return self.sources or self.names

    def rename(self, names: Sequence[str], *, is_new: bool) -> None:
        """Names the rows. AttachError on no names, on one given twice, and on more than there is room for."""
        if len(set(names)) != len(names) or not names:
            raise AttachError("sequences: one name for each row of the batch is needed, each another one")
        if len(names) > self._most:
            raise AttachError(f"{len(names)} sequences, the memory has room for max_sequences={self._most}")
        self.names = tuple(names)
        self.is_new = [is_new] * len(names)

    def make_up(self, batch: int) -> None:
        """Names the rows of a batch as nothing was named before."""
        stem = uuid.uuid4().hex[:12]
        self.rename([f"{stem}-{row}" for row in range(batch)], is_new=True)
        self.made_up.update(self.names)

    def check(self, batch: int) -> None:
        """AttachError where a batch has not as many rows as there are sequences to be read."""
        if len(self.read) != batch:
            raise AttachError(
                f"the batch has {batch} rows, the memory {len(self.read)} sequences; call new_documents(names) with a "
                "name for each row first"
            )

    def begin_anew(self, rows: Sequence[int]) -> None:
        """The next append of these rows begins their sequences anew."""
        for row in rows:
            self.is_new[row] = True

    def have_begun(self) -> None:
        """What is appended next goes on from what was appended."""
        self.is_new = [False] * len(self.names)
