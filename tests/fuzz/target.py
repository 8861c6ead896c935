"""Target: one decoder, ready to be given something.

It refuses by the errors that its callers know. Anything else that it raises is a bug, and comes out of `run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.fuzz.mutating import mutated

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder. seeds: what it takes; run: gives it something; mutate: changes a seed in its own manner."""

    seeds: Sequence[bytes]
    run: Callable[[bytes], None]
    mutate: Callable[[bytes, Random], bytes] = mutated
