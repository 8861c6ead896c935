"""The picture of a run: perplexity along the text, and which past each stretch of it read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from integration.demo.reading import ReadMap
    from integration.demo.report import Readings

NUM_POINTS = 64


def draw(readings: Readings, read_map: ReadMap, capacity: int, file: Path) -> None:
    """Writes a PNG. capacity: entries that the memory holds, drawn as the oldest that could be read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (curves, map_axes) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for label, reading, colour in (
        ("without memory", readings.none, "#8a8f98"),
        ("another document's memory", readings.other, "#d1783c"),
        ("its own memory", readings.memory, "#2563ae"),
    ):
        centres, values = _perplexity_along(reading.losses)
        curves.plot(centres, values, label=label, color=colour, linewidth=1.6)
    curves.set(xlabel="tokens read", ylabel="perplexity", title="Perplexity along the text", yscale="log")
    for axis_ticks in (curves.yaxis.set_major_formatter, curves.yaxis.set_minor_formatter):
        axis_ticks(ticker.FormatStrFormatter("%g"))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 3}  # where no curve is
    curves.legend(**below, frameon=False, fontsize=9, handlelength=1.2, columnspacing=1.2)
    curves.grid(alpha=0.25)
    _draw_map(figure, map_axes, read_map, capacity)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _perplexity_along(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = np.array_split(losses, min(NUM_POINTS, len(losses)))
    ends = np.cumsum([len(part) for part in parts])
    return ends, np.exp([part.mean(dtype=np.float64) for part in parts])


def _draw_map(figure: object, axes: object, read_map: ReadMap, capacity: int) -> None:
    share = read_map.mass / np.maximum(read_map.mass.sum(axis=1, keepdims=True), 1e-12)
    end = read_map.num_tokens
    image = axes.imshow(  # type: ignore[attr-defined]
        np.sqrt(share.T), origin="lower", extent=(0, end, 0, end), aspect="auto", cmap="magma_r"
    )
    axes.plot([capacity, end], [0, end - capacity], color="#2563ae", linewidth=1, label="oldest entry kept")  # type: ignore[attr-defined]
    axes.set(xlabel="tokens read", ylabel="position that was read", title="What each stretch of text read")  # type: ignore[attr-defined]
    axes.set(xlim=(0, end), ylim=(0, end))  # type: ignore[attr-defined]
    axes.legend(frameon=False, loc="upper left")  # type: ignore[attr-defined]
    figure.colorbar(image, ax=axes, label="share of attention (square root)")  # type: ignore[attr-defined]
