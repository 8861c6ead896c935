"""How rows are found, by IndexKind. A new index is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.index.exact import ExactIndex
from memstore.index.faiss_flat import FaissFlatIndex
from memstore.types import IndexKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.index.base import VectorIndex

INDEXES: dict[IndexKind, Callable[[], VectorIndex]] = {
    IndexKind.EXACT: ExactIndex,
    IndexKind.FAISS_FLAT: FaissFlatIndex,
}
