"""Documents: whole texts as token ids, one flat array with its splits, cached; and the streams that read them."""

from __future__ import annotations

import itertools
import json
import lzma
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from integration.training.tokenizer import pieces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".js", ".ts", ".java", ".go", ".rs")
"""What a folder's document is made of."""

BATCH_PIECES = 512


@dataclass(frozen=True, slots=True)
class Documents:
    """ids: (num_tokens,) unsigned, of all documents behind one another. splits: (num_documents + 1,) int64."""

    ids: np.ndarray
    splits: np.ndarray

    def __len__(self) -> int:
        return len(self.splits) - 1

    def spans(self, min_tokens: int, max_tokens: int) -> list[tuple[int, int]]:
        """[begin, end) of each document of at least min_tokens, cut into parts of at most max_tokens."""
        found = []
        for begin, end in zip(self.splits[:-1].tolist(), self.splits[1:].tolist(), strict=True):
            cuts = [*range(begin, end, max_tokens), end]
            found += [(first, last) for first, last in itertools.pairwise(cuts) if last - first >= min_tokens]
        return found

    @classmethod
    def join(cls, parts: Sequence[Documents]) -> Documents:
        """All documents of several collections."""
        offsets = np.cumsum([0, *(len(part.ids) for part in parts)])
        ends = [part.splits[1:] + offset for part, offset in zip(parts, offsets, strict=False)]
        return cls(np.concatenate([part.ids for part in parts]), np.concatenate([[0], *ends]).astype(np.int64))


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a path: the "text" of each line of .jsonl or .jsonl.xz, a text file, or a folder as one."""
    if path.is_dir():
        files = [each for each in sorted(path.rglob("*")) if each.suffix in TEXT_SUFFIXES and each.is_file()]
        yield "\n".join(each.read_text(encoding="utf-8", errors="replace") for each in files)
    elif path.name.endswith((".jsonl", ".jsonl.xz")):
        opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")
        with opened as lines:
            for number, line in enumerate(lines, start=1):
                document = json.loads(line)
                if not isinstance(document, dict) or not isinstance(document.get("text"), str):
                    raise ValueError(f'{path}: line {number} is no JSON object with a "text"')
                yield document["text"]
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def load_documents(paths: Sequence[Path], tokenizer: Any, cache: Path | None) -> Documents:
    """The documents of all paths as ids of a fast tokenizer, from `cache` where the same were encoded before."""
    return Documents.join([_load(path, tokenizer.backend_tokenizer, cache) for path in paths])


def _load(path: Path, tokenizer: Any, cache: Path | None) -> Documents:
    size = 0 if path.is_dir() else path.stat().st_size
    version = sha256(f"{tokenizer.to_str()}{path.parent.name}{path.name}{size}".encode()).hexdigest()[:16]
    cached = cache / f"{path.name.split('.')[0]}-{version}.npz" if cache and not path.is_dir() else None
    if cached is not None and cached.exists():
        stored = np.load(cached)
        return Documents(stored["ids"], stored["splits"])
    documents = _encode(read_texts(path), tokenizer)
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cached, ids=documents.ids, splits=documents.splits)
    return documents


def _encode(texts: Iterator[str], tokenizer: Any) -> Documents:
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    flat, lengths = [np.empty(0, dtype)], [0]
    for text in texts:
        cut = list(pieces(text))
        lengths.append(0)
        for begin in range(0, len(cut), BATCH_PIECES):
            batch = cut[begin : begin + BATCH_PIECES]
            encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            flat += [np.array(each.ids, dtype) for each in encoded]
            lengths[-1] += sum(len(each.ids) for each in encoded)
    return Documents(np.concatenate(flat), np.cumsum(lengths, dtype=np.int64))


class Streams:
    """Rows of a batch that each read one document after another, segment by segment, from one device-wide array.

    Every row reads consecutive segments of `segment` tokens and the one that follows; at a document's end it goes to
    the next of an endless shuffled order, beginning at a random place within the first segment.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        batch: int,
        segment: int,
        max_segments: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """max_segments: longer documents are cut. Raises ValueError where no document has two segments."""
        self._spans = documents.spans(2 * segment + 1, max_segments * segment + 1)
        if not self._spans:
            raise ValueError(f"data: no document has {2 * segment + 1} tokens, two segments")
        self._segment = segment
        self._generator = np.random.default_rng(seed)
        self._order: list[int] = []
        self._cursors = [(0, 0)] * batch
        self._ids = torch.from_numpy(documents.ids.astype(np.int32)).to(device)
        self._reach = torch.arange(segment + 1, device=device)

    def next_batch(self) -> tuple[torch.Tensor, list[int]]:
        """Windows (batch, segment + 1) int64 on the device, and the rows that begin a new document with it."""
        places, begun = self.next_places()
        starts = torch.tensor(places)
        if self._ids.is_cuda:
            starts = starts.pin_memory()
        starts = starts.to(self._ids.device, non_blocking=True)
        return self._ids[starts[:, None] + self._reach].long(), begun

    def next_places(self) -> tuple[list[int], list[int]]:
        """The same batch as places in the documents' ids: where each row's window begins, and the rows that begin."""
        begun = []
        for row, (begin, end) in enumerate(self._cursors):
            if end - begin < self._segment + 1:
                self._cursors[row] = self._next_span()
                begun.append(row)
        places = [begin for begin, _ in self._cursors]
        self._cursors = [(begin + self._segment, end) for begin, end in self._cursors]
        return places, begun

    def state(self) -> dict[str, Any]:
        """Where the rows are, as plain values."""
        return {"order": self._order, "cursors": self._cursors, "generator": self._generator.bit_generator.state}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a state of streams over the same documents."""
        self._order = list(state["order"])
        self._cursors = [(begin, end) for begin, end in state["cursors"]]
        self._generator.bit_generator.state = state["generator"]

    def _next_span(self) -> tuple[int, int]:
        if not self._order:
            self._order = self._generator.permutation(len(self._spans)).tolist()
        begin, end = self._spans[self._order.pop()]
        slack = min(self._segment, end - begin - 2 * self._segment - 1)
        return begin + int(self._generator.integers(0, slack + 1)), end
