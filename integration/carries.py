"""Carries: what the last tokens of each batch of sequences have found, for the first ones of its next pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from integration.forward import Forward
    from model_client.cache_attention import Carry

    Names = tuple[str, ...]


class Carries:
    """Of batches, by the names of their sequences."""

    def __init__(self) -> None:
        self._carries: dict[Names, Carry] = {}

    def get(self, names: Names) -> Carry | None:
        """That of a batch; None where nothing was found yet."""
        return self._carries.get(names)

    def pop(self, names: Names) -> Carry | None:
        """The same, which is forgotten here."""
        return self._carries.pop(names, None)

    def __setitem__(self, names: Names, carry: Carry) -> None:
        self._carries[names] = carry

    def clear(self) -> None:
        """Forgets all."""
        self._carries.clear()

    def take_back(self, names: Names, forward: Forward, unwanted: tuple[int, ...], context: int) -> None:
        """Makes that of a batch what it would be had the last tokens of a pass not been."""
        self._carries.pop(names, None)
        carry = forward.carry_without(unwanted, context)
        if carry is not None:
            self._carries[names] = carry

    def forget_rows(self, names: Names, rows: Sequence[int]) -> None:
        """Forgets all but that of a batch, of which these rows begin anew."""
        own = self._carries.get(names)
        self._carries.clear()
        if own is not None:
            entries = own.entries.clone()
            entries[list(rows)] = -1
            self._carries[names] = replace(own, entries=entries)
