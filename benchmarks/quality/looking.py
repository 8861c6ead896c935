"""What was retrieved: ages of hits and rare words on their later mentions."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality import mentions as words
from benchmarks.quality.reading import read
from benchmarks.quality.table import K

if TYPE_CHECKING:
    from benchmarks.quality.table import Table

EDGES = 2.0 ** np.arange(9, 18)
NAMES = ("under 512", *(f"{int(a)} to {int(b)}" for a, b in itertools.pairwise(EDGES)), "over 131072")
LOOKED_AT = 8  # one segment of so many


class Ages:
    """Counts hits and attention by age, and hits that another token's query has not made.

    rows: documents in lockstep. width: entries of a token's own hits. source, share: of each token, the position that
    it attended to most and how much; lists of (rows, tokens) arrays.
    """

    def __init__(self, rows: int, width: int, segment: int) -> None:
        self._rows, self._width, self._segment = rows, width, segment
        self._rng = np.random.default_rng(0)
        self.hits, self.mass = np.zeros(len(NAMES)), np.zeros(len(NAMES))
        self.novel: list[float] = []
        self.source: list[np.ndarray] = []
        self.share: list[np.ndarray] = []

    def __call__(self, begin: int, trace: Any) -> None:
        """Takes in the trace of the segment that begins at token `begin`."""
        positions, mass = trace.positions.numpy(), trace.mass.numpy()
        best, lines = mass.argmax(axis=1), np.arange(len(mass))
        self.source.append(positions[lines, best].reshape(self._rows, -1).astype(np.int32))
        self.share.append(mass[lines, best].reshape(self._rows, -1).astype(np.float16))
        if begin // self._segment % LOOKED_AT == LOOKED_AT - 1:
            self._count(begin, positions, mass)

    def _count(self, begin: int, positions: np.ndarray, mass: np.ndarray) -> None:
        count = len(positions) // self._rows
        tokens = begin + np.tile(np.arange(count), self._rows)
        is_read = positions >= 0
        age = np.digitize((tokens[:, None] - positions)[is_read], EDGES)
        self.hits += np.bincount(age, minlength=len(NAMES))
        self.mass += np.bincount(age, weights=mass[is_read], minlength=len(NAMES))
        own = positions[:count, : self._width]
        if begin >= 16 * K:
            control = own[self._rng.permutation(count)]
            is_same = (own[:, :, None] == control[:, None, :]).any(axis=2)
            self.novel.append(float((~is_same & (own >= 0)).sum() / max(1, (own >= 0).sum())))


def ages(table: Table) -> None:
    """Table 9: age of hits and of attention; hits that a control query would not have made."""
    for domain in table.options.domains:
        windows, variant = table.windows(domain), table.variant("ours")
        config = variant.adapter.config
        counted = Ages(len(windows.ids), config.top_k * config.window, int(variant.report["segment"]))
        reading = read(variant, windows.ids, capacity=128 * K, client=table.client, watch=counted)
        for number, name in enumerate(NAMES):
            hits, mass = counted.hits / counted.hits.sum(), counted.mass / counted.mass.sum()
            table.report.add(f"{domain}, age {name}", "share of hits", hits[number], "ratio")
            table.report.add(f"{domain}, age {name}", "share of attention", mass[number], "ratio")
        if counted.novel:
            novel = float(np.mean(counted.novel))
            table.report.add(f"{domain}, hits", "not made by another token's query", novel, "ratio", better="higher")
        if table.options.losses:
            kept = {"source": np.concatenate(counted.source, axis=1), "share": np.concatenate(counted.share, axis=1)}
            out = table.options.losses.with_name(f"sources-{domain}.npz")
            np.savez_compressed(out, losses=reading.losses.astype(np.float16), **kept)


def mentions(table: Table) -> None:
    """Table 9: rare words on their later mentions, and a page of what was read for them."""
    to_bytes, rows = words.Bytes(table.options.data), []
    for domain in table.options.domains:
        windows = table.windows(domain)
        without = read(table.variant("lora"), windows.ids).losses
        sources: list[np.ndarray] = []

        def watch(begin: int, trace: Any, kept: list[np.ndarray] = sources, count: int = len(windows.ids)) -> None:
            positions, mass = trace.positions.numpy(), trace.mass.numpy()
            best = positions[np.arange(len(mass)), mass.argmax(axis=1)]
            kept.append(np.where(mass.max(axis=1) > 0, best, -1).reshape(count, -1))

        reading = read(table.variant("ours"), windows.ids, capacity=128 * K, client=table.client, watch=watch)
        source, common = np.concatenate(sources, axis=1), words.common_words(table.options.data, domain, to_bytes)
        found = words.compare(windows.ids, without, reading.losses, common, to_bytes)
        for group, (count, nats, with_memory) in sorted(found.items()):
            case = f"{domain}, rare words, {group}"
            table.report.add(case, "mentions", count, "count", better="higher")
            table.report.add(case, "loss, LoRA only", nats, "nats a mention")
            table.report.add(case, "loss, ours", with_memory, "nats a mention")
        for row, ids in enumerate(windows.ids):
            those = list(words.mentions(ids, common, to_bytes))
            saved = without[row] - reading.losses[row]
            rows += words.examples(ids, saved, source[row], those, to_bytes, windows.names[row])[:6]
        table.write()
    if table.options.page:
        words.page(rows, table.options.page)
