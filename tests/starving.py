"""A device with hardly any memory left: ballast on a GPU; on the host, where memory seldom ends, what stands for it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.device import DeviceWorker

LEFT_BYTES = 256 << 20
"""What ballast is put into: beyond it this process gets nothing of the GPU, and others who test there have theirs."""
BALLAST = (64 << 20, 8 << 20, 1 << 20, 1 << 16)
"""Sizes of its pieces, each as often as there is room."""
LARGEST_BYTES = 64 << 10
"""On the host: larger tensors and arrays cannot be made."""


@contextmanager
def starved(worker: DeviceWorker) -> Iterator[None]:
    """For the length of the block the worker's device has no memory for large tensors."""
    with _ballast(worker.device) if worker.device.type == "cuda" else _refusals(worker):
        yield


@contextmanager
def _ballast(device: torch.device) -> Iterator[None]:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info(device)
    most = (torch.cuda.memory_reserved(device) + LEFT_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(min(most, 1.0), device)
    pieces: list[torch.Tensor] = []
    try:
        for size in BALLAST:
            while _adds(pieces, size, device):
                """Until there is no room for one more."""
        yield
    finally:
        pieces.clear()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _adds(pieces: list[torch.Tensor], size: int, device: torch.device) -> bool:
    try:
        pieces.append(torch.empty(size, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        return False
    return True


@contextmanager
def _refusals(worker: DeviceWorker) -> Iterator[None]:
    mode, thread = _Refusing(), worker.control(threading.get_ident).result()
    worker.control(mode.__enter__).result()
    try:
        with mock.patch.object(np, "empty", _refusing(np.empty, thread)):
            yield
    finally:
        worker.control(lambda: mode.__exit__(None, None, None)).result()


def _refusing(empty: Callable[..., Any], thread: int) -> Callable[..., Any]:
    """numpy.empty, which fails in one thread for what is larger than LARGEST_BYTES."""

    def made(*args: Any, **kwargs: Any) -> Any:
        array = empty(*args, **kwargs)
        if array.nbytes > LARGEST_BYTES and threading.get_ident() == thread:
            raise MemoryError("made up: there is no memory left")
        return array

    return made


class _Refusing(TorchDispatchMode):
    """Fails, in the thread that entered it, whatever makes a tensor that is larger than LARGEST_BYTES."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in _tensors(args, kwargs)}
        for each in _tensors((made,), None):
            storage = each.untyped_storage()
            if storage.nbytes() > LARGEST_BYTES and storage.data_ptr() not in given:
                raise torch.OutOfMemoryError("made up: there is no memory left")
        return made


def _tensors(args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """Those among the arguments of a call, in lists too."""
    for each in (*args, *(kwargs or {}).values()):
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each, None)
