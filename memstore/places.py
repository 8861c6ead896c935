"""Places: where a sequence lies, as one number: in the slab, in host memory, or in a file.

    [0, P) the slab on the device | [P, P + H) host memory | [P + H, ...) files, each number used once

P is `max_sequences`. H is one more than sequences may stay in host memory: the one more is what they pass through on
their way to a file and back, and while two change places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memstore.types import MemorySpec


@dataclass(frozen=True, slots=True)
class Places:
    """How the places of one memory are counted. num_device: P. num_host: H."""

    num_device: int
    num_host: int

    @classmethod
    def of(cls, spec: MemorySpec) -> Places:
        """Those of a memory of this spec; H is 0 where nothing is spilled."""
        return cls(spec.max_sequences, spec.spill.host_sequences + 1 if spec.spill.max_sequences else 0)

    def is_on_device(self, place: int) -> bool:
        """Whether it is one of the slab's."""
        return place < self.num_device

    def is_filed(self, place: int) -> bool:
        """Whether it is a file's."""
        return place >= self.num_device + self.num_host

    def on_host(self, number: int) -> int:
        """The place whose rows lie in this place of the slab in host memory."""
        return self.num_device + number

    def host_number(self, place: int) -> int:
        """Which place of the slab in host memory one there is."""
        return place - self.num_device

    def filed(self, number: int) -> int:
        """The place that the file of this number is."""
        return self.num_device + self.num_host + number

    def file_number(self, place: int) -> int:
        """The number of the file that it is."""
        return place - self.num_device - self.num_host
