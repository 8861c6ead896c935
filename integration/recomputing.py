"""Recomputing: which forward it is that a layer runs again for, in the backward pass of a checkpointed model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from integration.forward import Forward


class PendingForwards:
    """Forwards whose layers may run again. Each is kept for as long as the graph of its output is."""

    def __init__(self) -> None:
        self._forwards: WeakSet[Forward] = WeakSet()

    def add(self, forward: Forward, output: Any) -> None:
        """Keeps a forward with what it gave; there is nothing to do where no gradient will be asked for."""
        states = None if output is None else output[0]
        if isinstance(states, torch.Tensor) and states.requires_grad:
            states.register_hook(partial(_keep, forward))  # type: ignore[no-untyped-call]
            self._forwards.add(forward)

    def find(self, given: Mapping[str, Any]) -> Forward | None:
        """The one that a layer is given these arguments for: a checkpoint gives the same objects again.

        None where there is none at all. LookupError where it cannot be told.
        """
        alike = [forward for forward in self._forwards if forward.is_of(given)] or list(self._forwards)
        if len(alike) > 1:
            raise LookupError("several forwards wait for their backward pass, and have the same arguments")
        return alike[0] if alike else None


def _keep(_: Forward, __: torch.Tensor) -> None:
    """Leaves the gradient as it is: the hook is there to live as long as the graph, and the forward with it."""
