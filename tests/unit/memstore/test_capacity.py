"""Capacity: free memory is that of the machine or of the container, whichever is less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memstore.capacity import FREE_RATIO, capacity_of, free_host_bytes

MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n"


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [
        (None, None, 600 * 1024),
        ("max", "5", 600 * 1024),
        ("300000", "100000", 200_000),
        ("9000000", "0", 600 * 1024),
        ("1000", "2000", 0),
    ],
    ids=["no container", "no limit", "a limit", "a limit beyond the machine", "a limit that is passed"],
)
def test_free_host_memory(tmp_path: Path, limit: str | None, used: str | None, free: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    for name, text in (("memory.max", limit), ("memory.current", used)):
        if text is not None:
            (tmp_path / name).write_text(f"{text}\n")
    assert free_host_bytes(meminfo, tmp_path) == free


def test_a_share_of_what_is_free_may_be_reserved() -> None:
    free = free_host_bytes(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))
    assert 0 < capacity_of(torch.device("cpu")) < free
    assert FREE_RATIO < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_share_of_the_free_device_memory_may_be_reserved() -> None:
    assert 0 < capacity_of(torch.device("cuda:0")) <= torch.cuda.mem_get_info(0)[1] * FREE_RATIO
