"""Regions: shared memory whose size nobody can change, found again by its descriptor."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
from collections import deque
from pathlib import Path

import pytest
import torch

import memstore.region.cuda as cuda_module
import memstore.region.mapping as mapping_module
import memstore.slab as slab_module
from memstore.region import can_share, make_region, map_region, padded, pinned
from memstore.region.base import array
from memstore.region.mapping import COLLAPSE, HUGE_BYTES, POPULATE_WRITE, Mapping
from memstore.slab import Slab
from memstore.types import MemorySpec


def smaps(address: int) -> list[list[str]]:
    """What the kernel says of the mapping that begins at an address, line by line."""
    lines = [line.split() for line in Path("/proc/self/smaps").read_text().splitlines()]
    begins = [at for at, line in enumerate(lines) if line[0].startswith(f"{address:x}-")]
    return lines[begins[0] + 1 : begins[0] + 25] if begins else []


def is_mapped(address: int) -> bool:
    """True where a mapping begins there."""
    return bool(smaps(address))


def huge_bytes(address: int) -> int:
    """Of the shared memory that is mapped there."""
    return next((int(line[1]) << 10 for line in smaps(address) if line[0] == "ShmemPmdMapped:"), 0)


def can_be_huge() -> bool:
    """True where the kernel makes huge pages of shared memory when it is asked to."""
    descriptor = os.memfd_create("probe")
    os.ftruncate(descriptor, HUGE_BYTES)
    mapping = Mapping(descriptor, HUGE_BYTES)
    os.close(descriptor)
    return mapping.advise(POPULATE_WRITE, 0, HUGE_BYTES) and mapping.advise(COLLAPSE, 0, HUGE_BYTES)


def own_huge_bytes() -> int:
    """Of the memory that is this process's alone."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    return next(int(line[1]) << 10 for line in lines if line[0] == "AnonHugePages:")


def can_own_be_huge() -> bool:
    """True where the kernel makes huge pages of memory that is mapped anew, when it is asked to."""
    before = own_huge_bytes()
    pages = mmap.mmap(-1, 3 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    pages[:] = bytes(len(pages))
    return own_huge_bytes() >= before + 2 * HUGE_BYTES


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


def test_a_large_host_region_lies_where_huge_pages_can() -> None:
    size = 3 * HUGE_BYTES + 4096
    region = make_region(size, torch.device("cpu"))
    other = map_region(region.descriptor, size, torch.device("cpu"))
    between = make_region(4096, torch.device("cpu"))
    another = map_region(region.descriptor, size, torch.device("cpu"))
    assert not any(each.content.data_ptr() % HUGE_BYTES for each in (region, other, another))
    region.content[-1] = 7
    assert other.content[-1] == another.content[-1] == 7
    for each in (region, other, another, between):
        each.close()


@pytest.mark.skipif(not can_own_be_huge(), reason="this kernel makes no huge pages")
def test_rows_lie_in_huge_pages_also_where_small_ones_were_given_back_before() -> None:
    spec = MemorySpec(name="m", dim=128, capacity=16_384, dtype=torch.float16)
    for sizes in ([31 << 20, 30 << 20], [5 << 20] * 4):  # by the first glibc learns to keep what the others give back
        used = [torch.ones(size, dtype=torch.uint8) for size in sizes]
        used.clear()
    before = own_huge_bytes()
    slabs = [Slab(spec, torch.device("cpu")) for _ in range(3)]
    assert own_huge_bytes() >= before + slabs[0].keys.nbytes  # or more, as far as there are some
    assert not any(slab.keys.any() for slab in slabs)


@pytest.mark.skipif(not can_be_huge(), reason="this kernel makes no huge pages of shared memory")
def test_a_host_region_is_made_of_huge_pages() -> None:
    size = 3 * HUGE_BYTES + 4096
    region = make_region(size, torch.device("cpu"))
    other = map_region(region.descriptor, size, torch.device("cpu"))
    other.populate(0, size)
    assert huge_bytes(region.content.data_ptr()) == huge_bytes(other.content.data_ptr()) == 3 * HUGE_BYTES
    region.close()
    other.close()


def test_a_mapping_goes_with_its_last_user() -> None:
    region = make_region(HUGE_BYTES, torch.device("cpu"))
    first = region.content.data_ptr()
    rows = array(region, 4096, (4,), torch.float32)
    region.close()
    assert is_mapped(first)
    rows.fill_(1)
    del rows
    assert not is_mapped(first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_only_whole_pages_are_pinned() -> None:
    """A buffer of which a part is pinned cannot be copied: what is pinned shares no page with anything else."""
    spec, gpu = MemorySpec(name="m", dim=16, capacity=8, max_sequences=2), torch.device("cuda", 0)
    near = [torch.ones(1000) for _ in range(50)]
    slabs = [Slab(spec, torch.device("cpu"), is_shared=is_shared) for is_shared in (False, True)]
    near += [torch.ones(1000) for _ in range(50)]
    for slab in slabs:
        slab.pin(gpu)
    assert [slab.keys.is_pinned() for slab in slabs] == [False, True]
    for tensor in near:
        assert torch.equal(tensor.to(gpu).cpu(), tensor)
    with pytest.raises(ValueError, match="no whole pages"):
        pinned(near[0], gpu)
    for slab in slabs:
        slab.free()


def test_what_is_pinned_is_let_go_with_the_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(slab_module, "pinned", lambda *_: lambda: events.append("unpinned"))
    monkeypatch.setattr(mapping_module, "_munmap", lambda *_: events.append("unmapped"))
    for free in (True, False):
        slab = Slab(MemorySpec(name="m", dim=16, capacity=8), torch.device("cpu"), is_shared=True)
        slab.pin(torch.device("cuda"))
        if free:
            slab.free()
        del slab
        gc.collect()
    assert events == ["unpinned", "unmapped"] * 2


class FakeDriver:
    """Notes what is pinned and what is not any more."""

    class CUresult:
        CUDA_SUCCESS = 0

    def __init__(self) -> None:
        self.pinned: list[int] = []
        self.refuses = False

    def cuMemHostRegister(self, address: int, num_bytes: int, flags: int) -> tuple[int]:
        self.pinned.append(address)
        return (0,)

    def cuMemHostUnregister(self, address: int) -> tuple[int]:
        if self.refuses:
            return (201,)
        self.pinned.remove(address)
        return (0,)


def test_pages_that_cannot_be_unpinned_while_a_graph_is_captured_are_kept_until_they_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or else others would lie where pages are pinned, and CUDA would copy nothing of theirs."""
    driver, is_capturing, failures = FakeDriver(), [True], [torch.AcceleratorError("capturing")]

    def synchronize(_: torch.device) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(cuda_module, "_driver", lambda _: driver)
    monkeypatch.setattr(cuda_module, "_still_pinned", deque())  # without what other tests have left
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    regions = [make_region(mmap.PAGESIZE, torch.device("cpu")) for _ in range(3)]
    first, second, third = (cuda_module.pin(region.content, torch.device("cuda", 0)) for region in regions)
    addresses = [region.content.data_ptr() for region in regions]
    for region in regions:
        region.close()
    del regions, region
    first()  # in the thread that captures
    is_capturing[0] = False
    second()  # while another thread does
    assert driver.pinned == addresses
    assert all(is_mapped(address) for address in addresses)
    third()
    assert driver.pinned == []
    del first, second, third
    assert not any(is_mapped(address) for address in addresses)


def test_pages_that_come_while_the_device_is_waited_for_are_waited_for_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies from them may have begun after that wait did."""
    driver, unpins = FakeDriver(), []

    def synchronize(_: torch.device) -> None:
        if len(unpins) == 2:
            unpins.pop()()  # in another thread, which cannot wait
        elif unpins:
            raise torch.AcceleratorError("capturing")

    monkeypatch.setattr(cuda_module, "_driver", lambda _: driver)
    monkeypatch.setattr(cuda_module, "_still_pinned", deque())  # without what other tests have left
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    regions = [make_region(mmap.PAGESIZE, torch.device("cpu")) for _ in range(3)]
    addresses = [region.content.data_ptr() for region in regions]
    unpins += [cuda_module.pin(region.content, torch.device("cuda", 0)) for region in regions[:2]]
    last = cuda_module.pin(regions[2].content, torch.device("cuda", 0))
    unpins[0]()
    assert driver.pinned == addresses[1:]
    unpins.clear()
    last()
    assert driver.pinned == []
    for region in regions:
        region.close()


def test_pages_that_the_driver_does_not_unpin_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, gpu = FakeDriver(), torch.device("cuda", 0)
    monkeypatch.setattr(cuda_module, "_driver", lambda _: driver)
    monkeypatch.setattr(cuda_module, "_still_pinned", deque())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    regions = [make_region(mmap.PAGESIZE, torch.device("cpu")) for _ in range(2)]
    addresses = [region.content.data_ptr() for region in regions]
    first, second = (cuda_module.pin(region.content, gpu) for region in regions)
    for region in regions:
        region.close()
    del regions, region
    driver.refuses = True
    first()
    del first
    assert is_mapped(addresses[0])
    driver.refuses = False
    second()
    del second
    assert driver.pinned == []
    assert not any(is_mapped(address) for address in addresses)
