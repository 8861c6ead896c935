"""A model process that appends to lent sequences until it is killed, on a device that takes its time to write.

Arguments: target, device, memory. Row `position` of a sequence is that number in every element. Says, line by line,
how many rows of each sequence were appended.
"""

from __future__ import annotations

import sys
import time

import torch

from memstore.slab import Slab, StagedRows
from model_client import MemoryClient

NAMES = ("a", "b", "c")
COUNTS = (5, 64, 3)
"""Rows of each sequence in one step."""
DIM = 512
WRITE_S = 0.02
"""How long a write takes: most of a step, so that most kills fall into one."""
_write = Slab.write


def write_slowly(slab: Slab, rows: StagedRows, cells: torch.Tensor) -> None:
    """Every second row at once, and the others later."""
    for begin in (0, 1):
        norms = None if rows.norms is None else rows.norms[:, begin::2]
        _write(slab, StagedRows(rows.keys[:, begin::2], norms, {}), cells[begin::2])
        time.sleep(WRITE_S / 2)


def main() -> None:
    """Never ends by itself."""
    target, device, memory = sys.argv[1:]
    Slab.write = write_slowly  # type: ignore[method-assign]
    client = MemoryClient(target, plane="cuda" if device == "cuda" else "shm", timeout_s=60.0)
    session = client.session(memory, NAMES)
    base = torch.cat([torch.arange(count) for count in COUNTS]).to(device, torch.float32)
    per_step = torch.tensor([count for count in COUNTS for _ in range(count)]).to(device, torch.float32)
    number = 0
    while True:
        keys = (base + number * per_step)[:, None].expand(-1, DIM).contiguous()
        session.append(keys, COUNTS)
        number += 1
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
