"""A model process that appends to lent sequences as fast as it can, until it is killed.

Arguments: target, device, memory. Row `position` of a sequence is that number in every element. Says, line by line,
how many rows of each sequence were appended.
"""

from __future__ import annotations

import sys

import torch

from model_client import MemoryClient

NAMES = ("a", "b", "c")
COUNTS = (5, 64, 3)
"""Rows of each sequence in one step."""
DIM = 512


def main() -> None:
    """Never ends by itself."""
    target, device, memory = sys.argv[1:]
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
