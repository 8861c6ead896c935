"""CudaRegion: memory of a GPU from CUDA's virtual-memory calls, which give a file descriptor for it."""

from __future__ import annotations

import errno
import importlib.util
import mmap
import os
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def is_available(device: torch.device) -> bool:
    """True where the driver's calls are there (package cuda-bindings) and the GPU gives descriptors."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return False
    driver = _driver(device)
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
    return bool(_done(driver, driver.cuDeviceGetAttribute(attribute, device.index or 0)))


_still_pinned: deque[tuple[torch.device, Callable[[], bool]]] = deque()
"""What unpins pages that nobody uses any more, and could not yet; False where it still cannot."""


def pin(pages: torch.Tensor, device: torch.device) -> Callable[[], None]:
    """Pins whole pages of the host's memory, if that can be; what is given unpins them.

    That waits for all that is under way on the device, which cannot be while a CUDA graph is captured, as when garbage
    is collected then. The pages are kept in that case, or where the driver refuses, and unpinned with the next ones.
    """
    driver = _driver(device)
    address = pages.data_ptr()
    if address % mmap.PAGESIZE or pages.nbytes % mmap.PAGESIZE:
        raise ValueError(f"{pages.nbytes} bytes at {address:#x} are no whole pages")
    is_pinned = driver.cuMemHostRegister(address, pages.nbytes, 0)[0] == driver.CUresult.CUDA_SUCCESS

    def release() -> bool:
        return not is_pinned or driver.cuMemHostUnregister(pages.data_ptr())[0] == driver.CUresult.CUDA_SUCCESS

    def unpin() -> None:
        _still_pinned.append((device, release))
        if not torch.cuda.is_current_stream_capturing():
            _unpin_waiting()

    return unpin


def _unpin_waiting() -> None:
    """Unpins all that waits for it now; what comes to that meanwhile has copies that are not waited for here."""
    taken: list[tuple[torch.device, Callable[[], bool]]] = []
    with suppress(IndexError):  # another thread may take some, too
        while True:
            taken.append(_still_pinned.popleft())
    try:
        for device in {device for device, _ in taken}:
            torch.cuda.synchronize(device)
    except torch.AcceleratorError:  # another thread captures
        _still_pinned.extend(taken)
        return
    _still_pinned.extend([(device, release) for device, release in taken if not release()])


class CudaRegion:
    """See Region."""

    def __init__(self, handle: Any, descriptor: int, size_bytes: int, device: torch.device) -> None:
        """Maps an allocation, with all of the GPU's own rights; lets the handle go, which the mapping outlives."""
        driver = _driver(device)
        self.descriptor = descriptor
        self._size = size_bytes
        self._device = device
        self._address = int(_done(driver, driver.cuMemAddressReserve(size_bytes, 0, 0, 0)))
        try:
            _done(driver, driver.cuMemMap(self._address, size_bytes, 0, handle, 0))
            access = driver.CUmemAccessDesc()
            access.location = _properties(driver, device).location
            access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            _done(driver, driver.cuMemSetAccess(self._address, size_bytes, [access], 1))
        except OSError:
            driver.cuMemUnmap(self._address, size_bytes)
            driver.cuMemAddressFree(self._address, size_bytes)
            raise
        self.content = torch.as_tensor(_Bytes(self._address, size_bytes), device=device)

    @classmethod
    def make(cls, size_bytes: int, device: torch.device) -> CudaRegion:
        """A new region, zero. Raises OSError where the GPU has no room. size_bytes: as `padded` gives it."""
        driver = _driver(device)
        torch.cuda.empty_cache()  # what torch keeps and does not use is not there for others
        handle = _done(driver, driver.cuMemCreate(size_bytes, _properties(driver, device), 0))
        try:
            descriptor = int(_done(driver, driver.cuMemExportToShareableHandle(handle, _kind(driver), 0)))
            os.set_inheritable(descriptor, False)
            try:
                region = cls(handle, descriptor, size_bytes, device)
            except BaseException:
                os.close(descriptor)
                raise
        finally:
            driver.cuMemRelease(handle)
        region.content.zero_()
        torch.cuda.synchronize(device)
        return region

    @classmethod
    def map(cls, descriptor: int, size_bytes: int, device: torch.device) -> CudaRegion:
        """What another process made. Raises OSError; the driver refuses a size that is not the allocation's."""
        driver = _driver(device)
        handle = _done(driver, driver.cuMemImportFromShareableHandle(descriptor, _kind(driver)))
        own = os.dup(descriptor)
        try:
            return cls(handle, own, size_bytes, device)
        except BaseException:
            os.close(own)
            raise
        finally:
            driver.cuMemRelease(handle)

    def populate(self, offset: int, length: int) -> None:
        """Device memory is entered when it is mapped."""

    def close(self) -> None:
        """Waits for what the GPU still does with it, then gives up the mapping and the descriptor."""
        if self.descriptor < 0:
            return
        torch.cuda.synchronize(self._device)
        self.content = torch.empty(0, dtype=torch.uint8)
        driver = _driver(self._device)
        driver.cuMemUnmap(self._address, self._size)
        driver.cuMemAddressFree(self._address, self._size)
        os.close(self.descriptor)
        self.descriptor = -1


class _Bytes:
    """Device memory as torch takes it over without a copy."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _driver(device: torch.device) -> ModuleType:
    """The driver's calls, with the context of the device that torch uses being the current one."""
    from cuda.bindings import driver

    torch.cuda.current_stream(device).synchronize()  # which begins CUDA and makes the context
    return driver  # type: ignore[no-any-return]


def _properties(driver: Any, device: torch.device) -> Any:
    """Memory of the device that can be handed on by descriptor."""
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device.index or 0
    properties.requestedHandleTypes = _kind(driver)
    return properties


def _kind(driver: Any) -> Any:
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _done(driver: Any, result: tuple[Any, ...]) -> Any:
    """What a call of the driver gave. OSError where it failed, ENOMEM where there is no room."""
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        is_full = code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        raise OSError(errno.ENOMEM if is_full else errno.EINVAL, f"CUDA: {code.name}")
    return values[0] if values else None
