"""StoredRows: the rows of one layer of a generation, read from the slab that they lie in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.index.base import ONE_THREAD
from memstore.index.settings import CHUNK_ROWS, HOST_CHUNK_ROWS
from memstore.slab import Slab, inverse_norms, keys_spec
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.types import MemorySpec


@dataclass(frozen=True, slots=True)
class StoredRows:
    """See RowSource. check: called between pieces of bounded length; it may raise."""

    slab: Slab
    layer: int
    place: int
    first: int
    end: int
    check: Callable[[], None]

    @property
    def keys(self) -> torch.Tensor:
        """(capacity, dim) as they are stored."""
        return self.slab.keys[self.layer, self.place]

    @property
    def _step(self) -> int:
        """Rows that are read at a time; on the host as many as torch reads in this thread alone."""
        is_on_host = self.slab.device.type == "cpu"
        return max(ONE_THREAD // self.slab.dim, 1) if is_on_host else CHUNK_ROWS

    @property
    def _together(self) -> int:
        """Rows of a chunk."""
        return HOST_CHUNK_ROWS if self.slab.device.type == "cpu" else CHUNK_ROWS

    def __len__(self) -> int:
        return self.end - self.first

    def sample(self, num: int) -> torch.Tensor:
        """Every n-th row, read piece by piece with a call of `check` in between."""
        step, keys = max(len(self) // max(num, 1), 1), self.keys
        positions = torch.arange(self.first, self.end, step, device=keys.device)[:num]
        slots = ring.slot_of(positions, len(keys))
        found = torch.empty((len(slots), keys.shape[1]), device=keys.device)
        for some, target in zip(torch.split(slots, self._step), torch.split(found, self._step), strict=True):
            self.check()
            target.copy_(self._widened(keys.index_select(0, some)))
        return found

    def chunks(self) -> Iterator[torch.Tensor]:
        """Run by run, with calls of `check` as above."""
        keys = self.keys
        for run in ring.runs(self.first, self.end, len(keys)):
            for rows in torch.split(keys[run.slot : run.slot + run.length], self._together):
                found = torch.empty(rows.shape, device=rows.device)
                for some, target in zip(torch.split(rows, self._step), torch.split(found, self._step), strict=True):
                    self.check()
                    target.copy_(self._widened(some))
                yield found

    def _widened(self, rows: torch.Tensor) -> torch.Tensor:
        wide = rows.float()
        return wide * inverse_norms(wide)[:, None] if self.slab.metric is Metric.COSINE else wide


def random_rows(spec: MemorySpec, device: torch.device, num_rows: int) -> StoredRows:
    """Random rows of a memory's kind, for a first build, of which nothing is kept. They may be read on any stream.

    By numbers of their own: those of others go on as they would have, and a graph that another thread captures has the
    common ones to itself.
    """
    slab = Slab(replace(keys_spec(spec, num_rows), num_layers=1, max_sequences=1), device)
    rows = torch.randn(1, num_rows, spec.dim, device=device, generator=torch.Generator(device).manual_seed(0))
    slab.write(slab.stage(rows, {}), torch.arange(num_rows, device=device))
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return StoredRows(slab, 0, 0, 0, num_rows, lambda: None)
