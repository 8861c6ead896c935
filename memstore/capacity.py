"""Capacity: how many bytes of a device memories may reserve when nobody says so."""

from __future__ import annotations

import re
from pathlib import Path

import torch

FREE_RATIO = 0.8
"""Share of the free device memory; the rest is for the search's own working memory."""
_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)


def capacity_of(device: torch.device) -> int:
    """Bytes: 0.8 of what is free on the device at this moment."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = free_host_bytes(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))
    return int(free * FREE_RATIO)


def free_host_bytes(meminfo: Path, control_group: Path) -> int:
    """Bytes that this process could still take: of the machine, and of its container where that has a limit."""
    match = _AVAILABLE.search(meminfo.read_text())
    available = int(match[1]) * 1024 if match else 0
    try:
        limit = (control_group / "memory.max").read_text().strip()
        used = int((control_group / "memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))
