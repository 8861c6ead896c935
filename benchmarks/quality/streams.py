"""Training text on the device, and the order in which it is read, planned before a training begins."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.quality import data
from benchmarks.quality.planting import planted
from integration.training.documents import Documents, Streams

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

DOMAINS = ("books", "code")
MAX_SEGMENTS = 256
PLANTED_BOOKS = 10
NUM_EXCHANGES = 64


class Text:
    """Documents of both domains; ids: all of them on the device, code from `offset` on."""

    def __init__(self, documents: list[Documents], device: torch.device) -> None:
        self.documents, self.offset = documents, len(documents[0].ids)
        self.ids = torch.from_numpy(Documents.join(documents).ids.astype(np.int32)).to(device)


class Corpus:
    """Training and validation text on the device."""

    def __init__(self, folder: Path, device: torch.device, length: int) -> None:
        self.folder, self.device = folder, device
        plain = [data.load(folder, domain, "train")[0] for domain in DOMAINS]
        self._texts = {False: Text(plain, device)}
        self.held_out = [data.windows(folder, domain, "validation", length, 5) for domain in DOMAINS]
        self._plans: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.exchanges = self._exchanges(NUM_EXCHANGES)

    def text(self, is_planted: bool) -> Text:
        """The training text, with facts planted in some of its books if so."""
        if is_planted not in self._texts:
            books, code = self._texts[False].documents
            count = min(PLANTED_BOOKS, len(books))
            some = Documents(books.ids[: books.splits[count]], books.splits[: count + 1])
            words = json.loads((self.folder / "words.json").read_text())
            tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self._texts[True] = Text([planted(some, tokenizer, words["train"]), code], self.device)
        return self._texts[is_planted]

    def plan(self, steps: int, batch: int, segment: int, seed: int, is_planted: bool) -> tuple[Tensor, Tensor]:
        """Places and begun rows of every step, (steps, batch) int64 and bool; half books, half code."""
        key, text = (steps, batch, segment, seed, is_planted), self.text(is_planted)
        if key not in self._plans:
            parts = [
                Streams(
                    each, batch=batch // 2, segment=segment, max_segments=MAX_SEGMENTS * 512 // segment,
                    seed=seed, device=torch.device("cpu"),
                )
                for each in text.documents
            ]  # fmt: skip
            places = np.zeros((steps, batch), np.int64)
            begun = np.zeros((steps, batch), bool)
            for step in range(steps):
                for number, part in enumerate(parts):
                    first = number * (batch // 2)
                    found, new = part.next_places()
                    places[step, first : first + batch // 2] = np.array(found) + number * text.offset
                    begun[step, [first + row for row in new]] = True
            self._plans[key] = (torch.from_numpy(places).to(self.device), torch.from_numpy(begun).to(self.device))
        return self._plans[key]

    def _exchanges(self, count: int) -> Tensor:
        """(1 + count, vocabulary): the tokens themselves, then as many ways to exchange those that begin a name."""
        vocabulary = json.loads((self.folder / "tokenizer.json").read_text())["model"]["vocab"]
        names = sorted(
            n
            for token, n in vocabulary.items()
            if len(token) > 3 and token[0] == "Ġ" and token[1].isupper() and token[2:].islower()
        )
        rng, table = np.random.default_rng(0), np.tile(np.arange(max(vocabulary.values()) + 1), (count + 1, 1))
        for row in table[1:]:
            row[names] = rng.permutation(names)
        return torch.from_numpy(table).to(self.device)
