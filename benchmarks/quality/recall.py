"""recall: facts told once and asked for far beyond the window: how many come back right, with and without memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.quality.planting import KINDS, Probe, probe
from benchmarks.quality.reading import read
from benchmarks.quality.table import K

if TYPE_CHECKING:
    from benchmarks.quality.table import Table

SAID = {"key": "a key of ten digits", "pair": "a word that belongs to a name", "order": "seven words in their order"}
DISTANCES = (1 * K, 8 * K, 32 * K, 127 * K)


def recall(table: Table) -> None:
    """One key, eight pairs and one order a book, told and asked; `ours` and, where it is there, `recall`."""
    tokenizer = Tokenizer.from_file(str(table.options.data / "tokenizer.json"))
    words = _words(table)
    books = table.windows("books").ids
    for name, said in (("recall", "trained with such facts"), ("ours", "ours")):
        try:
            variant = table.variant(name)
        except KeyError:
            continue
        for distance in sorted({min(each, table.options.length - 1024) for each in DISTANCES}):
            rng = np.random.default_rng(distance)
            probes = [probe(book, distance, tokenizer, words, rng) for book in books for _ in range(2)]
            ids = padded(probes)
            for entries, with_memory in ((0, "no memory"), (128 * K, "memory")):
                reading = read(variant, ids, capacity=entries, client=table.client)
                for kind, figures in right(probes, reading).items():
                    case = f"{said}, {SAID[kind]}, {distance // K}K tokens before, {with_memory}"
                    table.report.add(case, "tokens right", figures[0], "%", better="higher")
                    table.report.add(case, "answers right", figures[1], "%", better="higher")
                    table.report.add(case, "loss", figures[2], "nats a token")
            table.write()


def _words(table: Table) -> list[str]:
    import json

    words: list[str] = json.loads((table.options.data / "words.json").read_text())["probe"]
    return words


def padded(probes: list[Probe], segment: int = 512) -> np.ndarray:
    """(probes, whole segments + 1) int64; 0 after the end of each."""
    length = -(-(max(len(each.ids) for each in probes) - 1) // segment) * segment + 1
    return np.stack([np.pad(each.ids, (0, length - len(each.ids))) for each in probes])


def right(probes: list[Probe], reading: Any) -> dict[str, tuple[float, float, float]]:
    """kind -> per cent of tokens and of whole answers that were the likeliest, token by token; nats a token."""
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    for row, each in enumerate(probes):
        for kind, begin, count in each.spans:
            place = slice(begin - 1, begin - 1 + count)
            is_right, nats = reading.is_right[row, place], reading.losses[row, place]
            found[kind].append((float(is_right.mean()), float(is_right.all()), float(nats.mean())))
    means = {kind: np.mean(rows, axis=0) for kind, rows in found.items() if rows}
    return {kind: (100 * tokens, 100 * answers, nats) for kind, (tokens, answers, nats) in means.items()}
