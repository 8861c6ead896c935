"""Repeated words: what a rare word costs when it is mentioned again, and which passage was read for it, as a page."""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.quality.data import load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_]{3,}")
RARE = 30
"""A word is rare that the sampled training documents have fewer times."""
SAMPLE_TOKENS = 4_000_000
WINDOW = 512
EXAMPLES = 12


@dataclass(frozen=True, slots=True)
class Mention:
    """One mention of a rare word: its tokens are [begin, end) of the document; number counts from 1.

    since: tokens since the last mention, 0 for the first.
    """

    word: bytes
    begin: int
    end: int
    number: int
    since: int


class Bytes:
    """Token ids as the bytes of their text."""

    def __init__(self, folder: Path) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        code = {chr(each): each for each in printable}
        others = [each for each in range(256) if each not in printable]
        code |= {chr(256 + number): each for number, each in enumerate(others)}
        assert set(code) == set(ByteLevel.alphabet())
        names = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
        self._texts = [bytes(code[c] for c in name) if number else b"" for number, name in enumerate(names)]

    def of(self, ids: np.ndarray) -> list[bytes]:
        """Each token's bytes."""
        return [self._texts[each] for each in ids.tolist()]


def common_words(folder: Path, domain: str, to_bytes: Bytes) -> set[bytes]:
    """Words that the training documents have RARE times or more, by a sample from their middle."""
    ids = load(folder, domain, "train")[0].ids
    begin = max(0, (len(ids) - SAMPLE_TOKENS) // 2)
    counts = Counter(WORD.findall(b"".join(to_bytes.of(ids[begin : begin + SAMPLE_TOKENS]))))
    return {word for word, count in counts.items() if count >= RARE}


def mentions(ids: np.ndarray, common: set[bytes], to_bytes: Bytes) -> Iterator[Mention]:
    """All mentions of words that are not common, in order."""
    parts = to_bytes.of(ids)
    ends = np.cumsum([len(part) for part in parts])
    seen: dict[bytes, tuple[int, int]] = {}
    for found in WORD.finditer(b"".join(parts)):
        word = found.group()
        if word in common:
            continue
        begin = int(np.searchsorted(ends, found.start(), side="right"))
        end = int(np.searchsorted(ends, found.end(), side="left")) + 1
        number, last = seen.get(word, (0, begin))
        seen[word] = (number + 1, begin)
        yield Mention(word, begin, end, number + 1, begin - last)


def group_of(mention: Mention) -> str:
    """What a mention is counted among."""
    if mention.number == 1:
        return "first mention"
    return "again within the window" if mention.since < WINDOW else "again after more than a window"


def compare(
    all_ids: np.ndarray, without: np.ndarray, with_memory: np.ndarray, common: set[bytes], to_bytes: Bytes
) -> Any:
    """group -> (mentions, nats a mention without, with), and per document the saving of those after a window.

    all_ids: (documents, length + 1). The losses (documents, length) are of the tokens from the second on.
    """
    sums: dict[str, list[float]] = {}
    for row, ids in enumerate(all_ids):
        for each in mentions(ids, common, to_bytes):
            if each.begin == 0:
                continue
            part = slice(each.begin - 1, min(each.end - 1, without.shape[1]))
            entry = sums.setdefault(group_of(each), [0.0, 0.0, 0.0])
            entry[0] += 1
            entry[1] += float(without[row, part].sum())
            entry[2] += float(with_memory[row, part].sum())
    return {group: (count, a / count, b / count) for group, (count, a, b) in sums.items() if count}


def examples(
    ids: np.ndarray, saved: np.ndarray, source: np.ndarray, found: list[Mention], to_bytes: Bytes, name: str
) -> list[dict[str, Any]]:
    """The mentions after a window that the memory saved most on, with the passage that was read; one a word."""
    far = [each for each in found if each.number > 1 and each.since >= WINDOW and each.end - 1 <= len(saved)]
    far.sort(key=lambda each: -float(saved[each.begin - 1 : each.end - 1].sum()))
    chosen: dict[bytes, dict[str, Any]] = {}
    parts = to_bytes.of(ids)
    for each in far:
        position = int(source[each.begin - 1])
        if each.word in chosen or position < 0 or len(chosen) == EXAMPLES:
            continue
        chosen[each.word] = {
            "document": name,
            "word": each.word.decode(),
            "saved": round(float(saved[each.begin - 1 : each.end - 1].sum()), 2),
            "age": each.begin - 1 - position,
            "before": _text(parts[max(0, each.begin - 60) : each.begin]),
            "mention": _text(parts[each.begin : each.end]),
            "source": _text(parts[max(0, position - 40) : position]),
            "read": _text(parts[position : position + 2]),
            "source_after": _text(parts[position + 2 : position + 24]),
        }
    return list(chosen.values())


def _text(parts: list[bytes]) -> str:
    return b"".join(parts).decode("utf-8", errors="replace")


def page(rows: list[dict[str, Any]], path: Path) -> None:
    """An HTML page: each mention beside the passage that it read."""
    cells = "\n".join(
        "<tr><td><pre>{before}<b>{mention}</b></pre></td><td><pre>{source}<mark>{read}</mark>{source_after}</pre></td>"
        "<td>{document}<br>{age:,} tokens before<br>{saved} nats saved</td></tr>".format(
            **{key: html.escape(value) if isinstance(value, str) else value for key, value in row.items()}
        )
        for row in rows
    )
    path.write_text(
        "<!doctype html><meta charset=utf-8><title>What the memory was read for</title>\n"
        "<style>body{font:14px sans-serif;margin:2em}td{vertical-align:top;border-top:1px solid #ccc;padding:6px}"
        "pre{white-space:pre-wrap;margin:0;max-width:38em}mark{background:#ffe08a}</style>\n"
        "<h1>What the memory was read for</h1>\n<p>Left: a word on its later mention, more than a window after the "
        "last. Right: the kept state that got the most attention when it was predicted, marked with the token after it."
        "</p>\n<table>\n" + cells + "\n</table>\n"
    )
