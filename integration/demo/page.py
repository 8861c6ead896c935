"""The run as one HTML page that needs no network: figures, picture, map, passages beside what they were read for."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from integration.demo.reading import BINS

if TYPE_CHECKING:
    from collections.abc import Callable

    from integration.demo.reading import ReadMap
    from integration.demo.report import Readings, Report

NUM_EXAMPLES = 12
PASSAGE_TOKENS = 48
SNIPPET_TOKENS = 60
TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    report: Report, readings: Readings, read_map: ReadMap, decode: Callable[[int, int], str], picture: Path, file: Path
) -> None:
    """Writes the page. decode(begin, end): the text of those tokens."""
    share = read_map.mass / np.maximum(read_map.mass.sum(axis=1, keepdims=True), 1e-12)
    length = read_map.num_tokens
    starts = [number * length // BINS for number in range(BINS)]
    content = {
        "lead": report.lines()[0] + ", read by a model whose own window is far shorter.",
        "figures": _figures(report),
        "picture": base64.b64encode(picture.read_bytes()).decode("ascii"),
        "map": np.round(share, 4).tolist(),
        "snippets": [decode(start, min(start + SNIPPET_TOKENS, length)) for start in starts],
        "examples": _examples(readings, read_map, decode),
    }
    script = json.dumps(content).replace("</", "<\\/")
    file.write_text(TEMPLATE.read_text(encoding="utf-8").replace("/*PAGE*/null", script), encoding="utf-8")


def _figures(report: Report) -> list[tuple[str, str]]:
    return [
        ("Perplexity without memory", f"{report.perplexity_none:.3f}"),
        ("Perplexity with its own memory", f"{report.perplexity_memory:.3f} ({-report.gain:+.1%})"),
        ("Perplexity with another document's memory", f"{report.perplexity_other_document:.3f}"),
        ("Bits per byte, without and with", f"{report.bits_per_byte_none:.4f}, {report.bits_per_byte_memory:.4f}"),
        ("Tokens a second, with memory", f"{report.tokens_per_s:,.0f} over {report.transport}"),
        ("Share of the time spent waiting for retrieval", f"{report.retrieval_share:.1%}"),
        ("Other document", report.other_text),
    ]


def _examples(readings: Readings, read_map: ReadMap, decode: Callable[[int, int], str]) -> list[dict[str, object]]:
    """The tokens with the largest gain, at most one a stretch of the text, so that they differ."""
    gain = readings.none.losses - readings.memory.losses
    has_source = read_map.source[: len(gain)] >= 0
    chosen: list[int] = []
    for token in np.argsort(-np.where(has_source, gain, -np.inf)):
        if len(chosen) == NUM_EXAMPLES or not has_source[token]:
            break
        if all(abs(int(token) - other) > read_map.num_tokens // BINS for other in chosen):
            chosen.append(int(token))
    return [_example(token, readings, read_map, decode) for token in chosen]


def _example(token: int, readings: Readings, read_map: ReadMap, decode: Callable[[int, int], str]) -> dict[str, object]:
    position = int(read_map.source[token])
    return {
        "token": token + 1,
        "position": position,
        "share": f"{read_map.share[token]:.0%}",
        "none": f"{readings.none.losses[token]:.2f}",
        "memory": f"{readings.memory.losses[token]:.2f}",
        "reading": _passage(token + 1, read_map.num_tokens, decode),
        "source": _passage(position, read_map.num_tokens, decode),
    }


def _passage(token: int, num_tokens: int, decode: Callable[[int, int], str]) -> tuple[str, str, str]:
    before = decode(max(0, token - PASSAGE_TOKENS), token)
    return before, decode(token, token + 1), decode(token + 1, min(num_tokens, token + 1 + PASSAGE_TOKENS // 2))
