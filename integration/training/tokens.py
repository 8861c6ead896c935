"""Documents as token ids: one flat array a collection, made once and cached as uint16."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from integration.training.disjoint import read_documents
from integration.training.tokenizer import END_OF_TEXT, pieces

Ids = NDArray[np.uint16]
BATCH_PIECES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Text the model is judged on: `ids` (n,) uint16 and the UTF-8 bytes that one token holds."""

    ids: Ids
    bytes_per_token: float


def encode(tokenizer: Tokenizer, texts: Iterator[str]) -> Ids:
    """The documents' ids one after another, each closed by END_OF_TEXT, (n,) uint16."""
    end, flat = tokenizer.token_to_id(END_OF_TEXT), list[Ids]()
    marked = ((piece, is_last) for text in texts for piece, is_last in with_last(text))
    while batch := list(islice(marked, BATCH_PIECES)):
        encoded = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
        for encoding, (_, is_last) in zip(encoded, batch, strict=True):
            flat.append(np.array(encoding.ids + [end] * is_last, np.uint16))
    return np.concatenate(flat)


def with_last(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a document, each with whether it is the last."""
    cut = list(pieces(text))
    return ((piece, place == len(cut) - 1) for place, piece in enumerate(cut))


def load(tokenizer: Tokenizer, path: Path, cache: Path) -> Ids:
    """The ids of a .jsonl.xz file, from `cache` where the same tokenizer has encoded it before."""
    version = sha256(tokenizer.to_str().encode() + str(path.stat().st_size).encode()).hexdigest()[:12]
    cached = cache / f"{path.parent.name}-{path.name.split('.')[0]}-{version}.npy"
    if not cached.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(cached, encode(tokenizer, (document["text"] for document in read_documents(path))))
    ids: Ids = np.load(cached)
    return ids


def held_out(tokenizer: Tokenizer, texts: list[str]) -> HeldOut:
    """A list of documents to be judged on."""
    ids = encode(tokenizer, iter(texts))
    return HeldOut(ids=ids, bytes_per_token=sum(len(text.encode()) for text in texts) / ids.size)


class Windows:
    """Random windows of two collections, held whole on the device as int16."""

    def __init__(self, code: Ids, books: Ids, device: torch.device, seed: int) -> None:
        """Ids are below 32768, so int16 holds them; torch cannot index uint16."""
        self._ids = torch.from_numpy(np.concatenate([code, books]).view(np.int16)).to(device)
        self._num_code, self._num_books = code.size, books.size
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, num_windows: int, length: int, code_ratio: float) -> torch.Tensor:
        """(num_windows, length) int64; each window is code with probability `code_ratio`."""
        device = self._ids.device
        # float64: float32 cannot tell the positions of more than 16.8 million tokens apart.
        places = torch.rand(2, num_windows, device=device, dtype=torch.float64, generator=self.generator)
        in_code = (places[1] * (self._num_code - length)).long()
        in_books = (places[1] * (self._num_books - length)).long() + self._num_code
        starts = torch.where(places[0] < code_ratio, in_code, in_books)
        return self._ids[starts[:, None] + torch.arange(length, device=device)].long()
