"""Figures of the quality tables, from benchmarks/results/quality-*.json alone.

python -m benchmarks.quality.figures    # docs/quality.png, and quality-*.png beside the results
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from benchmarks.report import RESULTS

MAIN = RESULTS.parents[1] / "docs" / "quality.png"
COLOURS = {"ours": "#2563ae", "Memorizing Transformers": "#d1783c", "LoRA only": "#8a8f98"}
FIGURES = ("perplexity against baseline", "the same, low end", "the same, high end")


def values(name: str) -> dict[tuple[str, str], float]:
    """(case, figure) -> value of a result."""
    rows = json.loads((RESULTS / f"quality-{name}.json").read_text())["rows"]
    return {(row["case"], row["figure"]): row["value"] for row in rows}


def capacity(pyplot: Any) -> None:
    """The main figure: change of perplexity against capacity."""
    found = values("capacity")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, domain in zip(axes, ("books", "code"), strict=True):
        for said in ("ours", "Memorizing Transformers"):
            points = []
            for number, entries in enumerate((0, 4, 16, 64, 128)):
                case = f"{domain}, {said}, {entries}K entries"
                if (case, FIGURES[0]) in found:
                    points.append((number, *(found[case, each] for each in FIGURES)))
            places, means, lows, highs = (np.array(each) for each in zip(*points, strict=True))
            axis.plot(places, means, marker="o", label=said, color=COLOURS[said])
            axis.fill_between(places, lows, highs, alpha=0.15, color=COLOURS[said], linewidth=0)
        case = f"{domain}, another document's memory, 16K entries"
        axis.plot([2], [found[case, FIGURES[0]]], "x", color="#b91c1c", label="another document's memory")
        axis.axhline(0, color=COLOURS["LoRA only"], linestyle="--", label="LoRA only")
        axis.set_xticks(range(5), ["0", "4K", "16K", "64K", "128K"])
        axis.set(xlabel="entries of memory", title=f"Test {domain}", ylabel="perplexity against LoRA only, %")
        axis.grid(alpha=0.25)
    axes[1].legend(frameon=False, loc="center right")
    figure.savefig(MAIN, dpi=120)


def ages(pyplot: Any) -> None:
    """Attention by age."""
    found = values("ages")
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    names = list(dict.fromkeys(case.split(", age ")[1] for case, _ in found if ", age " in case))[:-1]
    for offset, domain, colour in ((-0.2, "books", "#2563ae"), (0.2, "code", "#d1783c")):
        shares = [found[f"{domain}, age {name}", "share of attention"] for name in names]
        axis.bar(np.arange(len(names)) + offset, shares, 0.4, label=domain, color=colour)
    axis.set_xticks(range(len(names)), [name.replace(" to ", "\nto ") for name in names], fontsize=7)
    axis.set(xlabel="age of what was read, tokens", ylabel="share of attention")
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "quality-ages.png", dpi=110)


def eviction(pyplot: Any) -> None:
    """What leaves when full, against FIFO."""
    found = values("eviction")
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, domain in zip(axes, ("books", "code"), strict=True):
        for offset, share, colour in ((-0.2, 4, "#2563ae"), (0.2, 16, "#d1783c")):
            for number, policy in enumerate(("random", "lru", "attention", "duplicates")):
                case = f"{domain}, 1/{share} of the document, {policy}"
                if (case, FIGURES[0]) not in found:
                    continue
                mean, low, high = (found[case, each] for each in FIGURES)
                label = f"memory of 1/{share} of the document" if number == 0 else None
                bounds = [[mean - low], [high - mean]]
                axis.bar(number + offset, mean, 0.4, yerr=bounds, color=colour, label=label, capsize=2)
        axis.set_xticks(range(4), ["random", "LRU", "attention", "duplicates"], fontsize=8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=f"Test {domain}", ylabel="perplexity against FIFO, %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "quality-eviction.png", dpi=110)


def curves(pyplot: Any) -> None:
    """Training losses against LoRA only at the same steps, smoothed over 200 steps."""
    told = json.loads((RESULTS / "quality-trials.json").read_text())["curves"]
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    reference = np.array(told["lora, long"]["losses"])
    for name, said in (("ours, long", "ours"), ("mt, long", "Memorizing Transformers")):
        change = 100 * np.expm1(np.array(told[name]["losses"]) - reference)
        smooth = np.convolve(change, np.ones(4) / 4, mode="valid")
        axis.plot(50 * (np.arange(len(smooth)) + 4), smooth, label=said, color=COLOURS[said])
    axis.set(xlabel="steps of 16,384 tokens", ylabel="training perplexity against LoRA only, %")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "quality-curves.png", dpi=110)


def main() -> int:
    """Draws all figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for draw in (capacity, ages, eviction, curves):
        draw(pyplot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
