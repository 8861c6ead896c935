"""Regions: shared memory whose size nobody can change, found again by its descriptor."""

from __future__ import annotations

import fcntl
import os

import pytest
import torch

from memstore.region import can_share, make_region, map_region, padded
from memstore.region.base import array


@pytest.fixture
def shared(device: torch.device) -> torch.device:
    """Each device that is here and whose memory can be shared."""
    device = torch.device("cuda", 0) if device.type == "cuda" else device
    if not can_share(device):
        pytest.skip("no package cuda-bindings")
    return device


def test_what_one_writes_the_other_reads(shared: torch.device) -> None:
    size = padded(10_000, shared)
    region = make_region(size, shared)
    mine = array(region, 4096, (10, 10), torch.float32)
    assert not mine.any()
    other = map_region(region.descriptor, size, shared)
    other.populate(4096, 400)
    theirs = array(other, 4096, (10, 10), torch.float32)
    mine.fill_(3)
    if shared.type == "cuda":
        torch.cuda.synchronize()
    assert theirs.sum() == 300
    assert theirs.data_ptr() != mine.data_ptr()
    del mine
    region.close()
    region.close()
    assert theirs.sum() == 300, "it lives as long as anyone has it mapped"
    del theirs
    other.close()


def test_another_size_is_refused(shared: torch.device) -> None:
    region = make_region(padded(10_000, shared), shared)
    with pytest.raises(OSError, match=r"size|CUDA"):
        map_region(region.descriptor, padded(10_000_000, shared), shared)
    region.close()


def test_what_is_not_a_region_is_refused(shared: torch.device) -> None:
    size = padded(1, shared)
    descriptor = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    with pytest.raises(OSError, match=r"size|CUDA"):
        map_region(descriptor, size, shared)
    os.close(descriptor)


def test_a_host_region_cannot_be_cut_off_under_those_that_have_it_mapped() -> None:
    region = make_region(8192, torch.device("cpu"))
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(region.descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(region.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(region.descriptor)
    region.close()


def test_a_device_without_room_says_so(shared: torch.device) -> None:
    with pytest.raises((OSError, torch.OutOfMemoryError)):
        make_region(1 << 62, shared)
