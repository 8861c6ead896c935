"""How rows are found, by IndexKind. A new index that keeps nothing is one file and one line here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from memstore.errors import InvalidRequest
from memstore.index.building import build_thread
from memstore.index.exact import ExactIndex, prepare
from memstore.index.faiss_flat import FaissFlatIndex
from memstore.index.generations import GenerationIndex
from memstore.index.graph_parts import GraphBuilder
from memstore.index.host_parts import HostBuilder
from memstore.index.list_parts import ListBuilder
from memstore.index.settings import graph_shape, has_lists, index_bytes, list_shape
from memstore.logs import trouble
from memstore.types import IndexKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from memstore.index.base import VectorIndex
    from memstore.index.generation import PartBuilder
    from memstore.types import MemorySpec

_log = logging.getLogger(__name__)

__all__ = ["INDEXES", "build_thread", "index_bytes", "make_index", "prepare"]

INDEXES: dict[IndexKind, Callable[[], VectorIndex]] = {
    IndexKind.EXACT: ExactIndex,
    IndexKind.FAISS_FLAT: FaissFlatIndex,
}
"""Those that keep nothing between calls."""


BUILDERS: dict[str, Callable[[MemorySpec, torch.device], PartBuilder]] = {"cpu": HostBuilder, "cuda": GraphBuilder}
"""What builds the generations of the others, by type of device; but for inverted lists of rows on a GPU."""


def make_index(spec: MemorySpec, device: torch.device, executor: Executor) -> VectorIndex:
    """The index of a memory. executor: where it builds.

    Raises InvalidRequest where it cannot be had here, and DeviceMemoryFull.
    """
    if spec.index in INDEXES:
        return INDEXES[spec.index]()
    if device.type == "cuda":
        make = _list_index if has_lists(spec, device) else _graph_index
        return make(spec, device, executor)
    return GenerationIndex(spec, BUILDERS[device.type](spec, device), executor)


def _list_index(spec: MemorySpec, device: torch.device, executor: Executor) -> GenerationIndex:
    """Inverted lists of our own."""
    builder = ListBuilder(spec, device)
    if not index_bytes(spec, device):
        return GenerationIndex(spec, builder, executor)
    try:
        from memstore.gpu.lists import ListRetriever, warm
    except ImportError as error:
        raise InvalidRequest("spec.index", f"{spec.index.value} needs Triton, which is not here") from error
    shape = list_shape(spec)
    lists = ListRetriever(spec, shape, device)
    _rehearse(executor, spec, device, lambda: warm(spec, shape, device), builder.prepare)
    return GenerationIndex(spec, builder, executor, lists)


def _graph_index(spec: MemorySpec, device: torch.device, executor: Executor) -> GenerationIndex:
    """Graphs of our own."""
    builder = GraphBuilder(spec, device)
    if not index_bytes(spec, device):
        return GenerationIndex(spec, builder, executor)
    from memstore.gpu.graphs import GraphRetriever

    graphs = GraphRetriever(spec, graph_shape(spec), device)
    _rehearse(executor, spec, device, builder.prepare)
    return GenerationIndex(spec, builder, executor, graphs)


def _rehearse(executor: Executor, spec: MemorySpec, device: torch.device, *parts: Callable[[], None]) -> None:
    """Has done in the build thread, before the first build, what is slow the first time; it may fail without harm."""

    def run(part: Callable[[], None]) -> None:
        try:
            with torch.cuda.device(device):  # which is not the current one of a new thread
                part()
        except Exception as error:  # a root: nobody waits for it
            trouble(_log, "what an index needs first could not be made ready", error, memory=spec.name)

    for part in parts:
        executor.submit(run, part)
