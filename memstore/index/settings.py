"""Settings of approximate indexes: which belong to which kind, what they are when nobody says, and what they cost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from memstore.gpu.graphing import GraphShape
from memstore.gpu.listing import ListShape
from memstore.types import IndexKind, IndexSettings, Metric

if TYPE_CHECKING:
    import torch

    from memstore.types import MemorySpec

SETTINGS: dict[IndexKind, tuple[str, ...]] = {
    IndexKind.FAISS_IVF_FLAT: ("generation_rows", "nlist", "nprobe"),
    IndexKind.FAISS_IVF_PQ: ("generation_rows", "nlist", "nprobe", "pq_m", "pq_bits"),
    IndexKind.FAISS_CAGRA: ("generation_rows", "graph_degree", "itopk"),
}
"""The fields of IndexSettings that each kind has; a kind that is not here keeps nothing between calls."""

SAMPLES_A_LIST = 64
"""Rows that the centre of a list is trained with, on average: FAISS asks for 39 at least."""

CHUNK_ROWS = 16_384
"""Rows that a build takes in at a time, on a GPU."""

HOST_CHUNK_ROWS = 512
"""And on the host: to find the list of each takes two to four milliseconds."""

CODED_ROWS = 8_192
"""Rows that product codes are trained with: 32 for each of the 256 values of a code."""

SCORE_BYTES = 256 << 20
"""What torch takes on a GPU to compare rows with centres."""

USUAL_CODES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
"""The numbers of codes a row among which one is chosen when nobody says how many."""

MOST_MET = 128
"""Rows that a walk on a GPU keeps at most, however many are asked for."""

ENTRIES = 1024
"""Rows of a generation at least among which its graph is entered, where there are so many."""

ENTRY_STRIDE = 16
"""Rows for each of them, where there are more."""

GRAPH_BYTES = 1 << 30
"""What the build of a graph on a GPU takes whatever its rows: the maxima and the scores of what it searches for."""

LINK_BYTES = 72
"""And for each link, of the rows near it and of ways to turn links round."""

SAMPLES_A_CENTRE = 32
"""Rows that the centre of a list on a GPU is learnt from, on average."""

LIST_ROWS = 256
"""Rows of a list on a GPU at most."""

CENTRE_ROWS = 128
"""Rows that one of its centres has, on average, or fewer."""

FAR_AWAY = 6e4
"""What the elements of a centre are that no query is near to: a number that every dtype has."""

MOST_LISTS = 128
"""Lists that are read for a query on a GPU at most, of all generations together."""

_LEAST_GENERATION, _MOST_GENERATION = 16_384, 4_194_304
_GENERATIONS = 8
_LISTS_PROBED = 1 / 16
_LIST_BYTES = 256


def settings_of(spec: MemorySpec) -> IndexSettings:
    """The settings of a memory whose index has some, those that are not given chosen for it."""
    return filled_in(spec.index, spec.index_settings or IndexSettings(), spec.capacity, spec.dim)


def filled_in(kind: IndexKind, given: IndexSettings, capacity: int, dim: int) -> IndexSettings:
    """Settings with everything that is 0 chosen: 8 generations, and lists as many as four roots of their rows."""
    rows = given.generation_rows or min(max(capacity // _GENERATIONS, _LEAST_GENERATION), _MOST_GENERATION)
    if kind is IndexKind.FAISS_CAGRA:
        degree = given.graph_degree or max(4, min(64, rows // 8 * 2))
        return replace(given, generation_rows=rows, graph_degree=degree, itopk=given.itopk or 128)
    nlist = given.nlist or max(1, min(_power_of_two(4 * math.isqrt(rows)), rows // 2))
    chosen = replace(
        given, generation_rows=rows, nlist=nlist, nprobe=given.nprobe or max(min(nlist, 8), int(nlist * _LISTS_PROBED))
    )
    if kind is IndexKind.FAISS_IVF_FLAT:
        return chosen
    return replace(chosen, pq_m=given.pq_m or _codes(dim), pq_bits=given.pq_bits or 8)


def has_lists(spec: MemorySpec, device: torch.device) -> bool:
    """Whether generations are inverted lists of our own, see gpu/lists.py.

    Product codes are of no use there: they take memory beside the rows, and the few rows that are read are soon read.
    """
    return device.type == "cuda" and spec.index in (IndexKind.FAISS_IVF_FLAT, IndexKind.FAISS_IVF_PQ)


def list_shape(spec: MemorySpec) -> ListShape:
    """What lists on a GPU are like: a centre for every 128 rows, at least.

    As large a share of the rows is looked at as the settings say, as long as that is no more than MOST_LISTS have.
    """
    settings = settings_of(spec)
    rows = settings.generation_rows
    shape = ListShape(
        span=rows,
        num_centres=min(max(settings.nlist, rows // CENTRE_ROWS), max(rows // 2, 1)),
        width=LIST_ROWS,
        num_chosen=MOST_LISTS,
        num_generations=-(-spec.capacity // rows),
        nowhere=FAR_AWAY if spec.metric is Metric.L2 else 0.0,
    )
    probed = -(-settings.nprobe * shape.num_together * shape.num_generations // settings.nlist)
    return replace(shape, num_chosen=min(probed, MOST_LISTS))


def graph_shape(spec: MemorySpec) -> GraphShape:
    """What graphs on a GPU are like."""
    settings = settings_of(spec)
    span = settings.generation_rows
    return GraphShape(
        span=span,
        num_links=settings.graph_degree,
        num_met=min(MOST_MET, 1 << (settings.itopk - 1).bit_length()),
        num_generations=-(-spec.capacity // span),
        stride=min(ENTRY_STRIDE, max(span // ENTRIES, 1)),
        nowhere=FAR_AWAY if spec.metric is Metric.L2 else 0.0,
    )


def must_read_all(spec: MemorySpec) -> bool:
    """Whether every list shall be read, and these are more than can be: then everything is scanned."""
    if spec.index is IndexKind.FAISS_CAGRA:
        return False
    settings, shape = settings_of(spec), list_shape(spec)
    return settings.nprobe >= settings.nlist and shape.num_chosen < shape.num_together * shape.num_generations


def index_bytes(spec: MemorySpec, device: torch.device) -> int:
    """Bytes that the index of a memory may take at most: every generation that can be live, and one being built."""
    if spec.index not in SETTINGS:
        return 0
    settings = settings_of(spec)
    if settings.generation_rows > spec.capacity:
        return 0
    if device.type == "cuda":
        return _lists_bytes(spec) if has_lists(spec, device) else _graphs_bytes(spec)
    num_generations = -(-spec.capacity // settings.generation_rows) * spec.max_sequences
    each = _part_bytes(spec, settings) * spec.num_layers
    return num_generations * each + _build_bytes(spec, settings)


def _lists_bytes(spec: MemorySpec) -> int:
    """Bytes of all lists, of those being built, and of working memory of a build."""
    shape = list_shape(spec)
    each = spec.dim * spec.dtype.itemsize + 4 + 4 * shape.width
    generations = shape.num_generations * spec.max_sequences + 2
    sample = 2 * 4 * spec.dim * SAMPLES_A_CENTRE * shape.num_centres
    chunk = 2 * 4 * spec.dim * (CHUNK_ROWS + shape.num_centres)
    return generations * spec.num_layers * shape.num_together * each + sample + chunk + 64 * shape.span + SCORE_BYTES


def _graphs_bytes(spec: MemorySpec) -> int:
    """Bytes of the links and entries of all generations, of those being built, and of working memory of a build."""
    shape = graph_shape(spec)
    generations = shape.num_generations * spec.max_sequences + 2
    each = 4 * shape.num_links * shape.span + shape.num_entries * (spec.dim * spec.dtype.itemsize + 4)
    return generations * spec.num_layers * each + LINK_BYTES * shape.num_links * shape.span + GRAPH_BYTES


def _part_bytes(spec: MemorySpec, settings: IndexSettings) -> int:
    """Bytes of the index of one generation in one layer. What grows while it is built may take twice its size."""
    rows, row_bytes = settings.generation_rows, spec.dim * spec.dtype.itemsize
    if spec.index is IndexKind.FAISS_CAGRA:
        return 2 * rows * (row_bytes + 6 * settings.graph_degree + 32)
    fixed = settings.nlist * (4 * spec.dim + _LIST_BYTES)
    if spec.index is IndexKind.FAISS_IVF_PQ:
        row_bytes = -(-settings.pq_m * settings.pq_bits // 8)
        fixed += 4 * spec.dim << settings.pq_bits
    return fixed + rows * (row_bytes + 8)


def _build_bytes(spec: MemorySpec, settings: IndexSettings) -> int:
    """Bytes of working memory of one build."""
    rows = settings.generation_rows
    chunk = 4 * min(CHUNK_ROWS, rows) * (2 * spec.dim + max(settings.nlist, 1))
    if spec.index is IndexKind.FAISS_CAGRA:
        return chunk
    sample = min(rows, max(settings.nlist * SAMPLES_A_LIST, CODED_ROWS))
    return chunk + 16 * rows + 12 * sample * spec.dim


def _power_of_two(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)


def _codes(dim: int) -> int:
    """The largest usual number of codes that divides a row evenly, at most one for eight elements."""
    return max(codes for codes in USUAL_CODES if codes <= max(dim // 8, 1) and dim % codes == 0)
