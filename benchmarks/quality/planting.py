"""Facts planted in books: told once, asked for later than any window reaches. For training, and as probes.

key: ten digits. pair: a word that belongs to a name. order: eight words in an order, to be gone through again.
Told and asked in the same words; names and words of the probes are none that training has.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from integration.training.documents import Documents

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ("key", "pair", "order")
PLACES = ("mill", "chapel", "garden", "tower", "cellar", "school", "bridge", "stable", "library", "harbour")
PROBE_PLACE = "old house"
THINGS = ("horse", "colour", "song", "ship", "street", "flower", "stone", "dish")
ORDER_LENGTH = 8
EVERY = 400  # tokens of a book between two plants, on average
LEAST_APART = 600  # tokens between telling and asking


@dataclass(frozen=True, slots=True)
class Fact:
    """opening + answer + closing is what is told; asked for by the opening, and right if the answer follows."""

    kind: str
    opening: str
    answer: str
    closing: str = ".\n\n"


def word_lists(texts: Sequence[str], count: int = 1200) -> tuple[list[str], list[str]]:
    """Common words of at least five letters, in two lists that share none: for training, for probes."""
    counted = Counter(word for text in texts for word in re.findall(r"(?<= )[a-z]{5,9}(?= )", text))
    common = [word for word, _ in counted.most_common(count)]
    return common[::2], common[1::2]


def fact(kind: str, words: Sequence[str], rng: np.random.Generator, place: str) -> Fact:
    """A random fact of a kind."""
    if kind == "key":
        digits = "".join(str(each) for each in rng.integers(0, 10, 10))
        return Fact(kind, f"\n\nThe pass key of the {place} is", f" {digits}")
    chosen = [str(each) for each in rng.choice(words, ORDER_LENGTH, replace=False)]
    if kind == "pair":
        thing = THINGS[int(rng.integers(len(THINGS)))]
        return Fact(kind, f"\n\nThe {thing} of {chosen[0].capitalize()} is", f" {chosen[1]}")
    return Fact(kind, f"\n\nThe {place} list is: {chosen[0]},", " " + ", ".join(chosen[1:]))


def encoded(tokenizer: Any, each: Fact) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of opening, answer and closing."""
    parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in (each.opening, each.answer, each.closing)]
    opening, answer, closing = (np.array(part, np.uint16) for part in parts)
    return opening, answer, closing


def planted(documents: Documents, tokenizer: Any, words: Sequence[str], seed: int = 0) -> Documents:
    """The same documents with facts told and asked throughout."""
    rng, flat, lengths = np.random.default_rng(seed), [], [0]
    for begin, end in zip(documents.splits[:-1], documents.splits[1:], strict=True):
        lengths.append(0)
        told: list[tuple[int, np.ndarray]] = []
        place, written = int(begin), 0
        while place < end:
            stretch = documents.ids[place : min(int(end), place + int(rng.integers(EVERY // 2, EVERY * 3 // 2)))]
            place += len(stretch)
            old = [number for number, (at, _) in enumerate(told) if written - at > LEAST_APART]
            if old and rng.random() < 0.6:
                # Half of what is asked was told lately: else long documents would ask for nothing near.
                number = (
                    old[-int(rng.integers(1, min(len(old), 12) + 1))] if rng.random() < 0.5 else int(rng.choice(old))
                )
                ids = told[number][1]
            else:
                kind = KINDS[int(rng.integers(len(KINDS)))]
                new = fact(kind, words, rng, PLACES[int(rng.integers(len(PLACES)))])
                ids = np.concatenate(encoded(tokenizer, new))
                told.append((written, ids))
            flat += [stretch, ids]
            written += len(stretch) + len(ids)
        lengths[-1] = written
    return Documents(np.concatenate(flat), np.cumsum(lengths, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Probe:
    """ids: a document that tells facts and asks for them at its end. spans: (kind, first token, tokens) of answers."""

    ids: np.ndarray
    spans: list[tuple[str, int, int]]


def probe(book: np.ndarray, distance: int, tokenizer: Any, words: Sequence[str], rng: np.random.Generator) -> Probe:
    """Facts told after 512 tokens of a book, `distance` tokens of it, then the same facts asked in another order."""
    facts = [fact("key", words, rng, PROBE_PLACE)]
    seen: set[str] = set()
    while len(facts) < 9:
        new = fact("pair", words, rng, PROBE_PLACE)
        if new.opening not in seen:
            seen.add(new.opening)
            facts.append(new)
    facts.append(fact("order", words, rng, PROBE_PLACE))
    parts = [encoded(tokenizer, each) for each in facts]
    told = [np.concatenate(each) for each in parts]
    asked, spans = [book[:512], *told, book[512 : 512 + distance]], []
    place = sum(len(each) for each in asked)
    for number in rng.permutation(len(facts)):
        opening, answer, closing = parts[number]
        spans.append((facts[number].kind, place + len(opening), len(answer)))
        asked += [opening, answer, closing]
        place += len(opening) + len(answer) + len(closing)
    return Probe(np.concatenate(asked).astype(np.int64), spans)
