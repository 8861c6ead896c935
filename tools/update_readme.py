"""Writes what was measured and counted into the documents, so that no number in them is typed by hand.

    python tools/update_readme.py --report demo-report   take over a run of the demo, then write
    python tools/update_readme.py                        write from what is in the repository
    python tools/update_readme.py --check                exit with 1 where a document is not what would be written

A run is kept as docs/demo.json and docs/demo.png. Results of benchmarks are read from benchmarks/results/*.json, the
packages of the training text from integration/training/corpus.json, what of the demo's texts is in the training texts
from disjoint.json beside that and in benchmarks/quality. Each goes between two marks of one document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parent.parent
COMMIT_DIGITS = 9


def demo_numbers(root: Path) -> str:
    """The table of the demo's three readings, and what it cost."""
    file = root / "docs" / "demo.json"
    if not file.exists():
        return "No run is recorded in this revision. `make demo` prints this table."
    run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    none = run["perplexity_none"]
    rows = [
        ("no memory", none, f"{run['bits_per_byte_none']:.4f}"),
        ("its own memory", run["perplexity_memory"], f"{run['bits_per_byte_memory']:.4f}"),
        ("another document's memory (control)", run["perplexity_other_document"], ""),
    ]
    body = [
        (name, f"{value:.3f}", "" if value == none else f"{value / none - 1:+.1%}", bits) for name, value, bits in rows
    ]
    memory = ", ".join(f"{name} {value}" for name, value in run["memory"].items())
    model, lora, weights = (f"{run[f'{name}_parameters'] / 1e6:.2f} M" for name in ("model", "lora", "memory"))
    sizes = f"{model} parameters, with {lora} of LoRA merged for all three readings, and {weights} memory weights"
    speed = f"{run['tokens_per_s']:,.0f} tokens/s with memory over `{run['transport']}`"
    waiting = f"{run['retrieval_share']:.1%} of the time waiting for retrieval"
    return "\n\n".join(
        [
            _table(("The model reads with", "perplexity per token", "change", "bits per byte"), body),
            f"Text: {run['tokens']:,} tokens ({run['bytes']:,} bytes) of {run['text']}. Control: {run['other_text']}.",
            f"Model: {sizes}. Memory: {memory}.",
            f"Speed on {run['machine']}: {speed}, {run['tokens_per_s_none']:,.0f} without; {waiting}.",
        ]
    )


def benchmark_results(root: Path) -> str:
    """One line a result: where, of what, by which command, and how many rows reach their goal."""
    files = sorted((root / "benchmarks" / "results").glob("*.json"))
    if not files:
        return "No result is recorded in this revision. `make bench` writes them."
    return _table(("result", "machine", "commit", "command", "rows at their goal"), [_result(file) for file in files])


def _result(file: Path) -> Sequence[str]:
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    aimed = [row for row in result["rows"] if row.get("goal") is not None]
    reached = sum(
        row["value"] <= row["goal"] if row["better"] == "lower" else row["value"] >= row["goal"] for row in aimed
    )
    share = f"{reached} of {len(aimed)}" if aimed else "none has one"
    return (f"`{file.name}`", result["machine"], result["commit"][:COMMIT_DIGITS], f"`{result['command']}`", share)


GPU_SEARCH_COLUMNS = (
    ("floor", "floor, us"),
    ("memstore, on the device", "on the device, us"),
    ("memstore, on the device / floor", "/ floor"),
    ("memstore, standing", "decode loop, us"),
    ("memstore", "engine, us"),
    ("torch bmm and topk", "torch bmm and topk, us"),
    ("faiss.knn_gpu in a loop", "faiss.knn_gpu loop, us"),
    ("neurocache", "neurocache, us"),
)


SEARCH_COLUMNS = (
    ("memstore", "memstore, ms"),
    ("read floor", "read floor, ms"),
    ("time / read floor", "/ floor"),
    ("faiss.knn in a loop", "faiss.knn loop, ms"),
    ("torch products and topk", "torch, ms"),
    ("neurocache (approximate)", "neurocache, ms"),
    ("time / best rival", "/ best rival"),
    ("memstore, with rows and windows", "with rows and windows, ms"),
)
PLANE_COLUMNS = (
    ("in process", "in process, ms"),
    ("shm", "shm, ms"),
    ("cuda", "cuda, ms"),
    ("inline, stream", "inline by stream, ms"),
    ("inline, unary", "inline by unary calls, ms"),
    ("shm / in process", "shm / in process"),
    ("cuda / in process", "cuda / in process"),
    ("inline, stream / in process", "stream / in process"),
)
LARGE_COLUMNS = (
    ("recall@16", "recall@16"),
    ("recall@16, plain FAISS", "plain FAISS"),
    ("queries/s, 64 at a time, memstore", "queries/s, 64 at a time"),
    ("queries/s, 64 at a time, plain FAISS", "plain FAISS"),
    ("queries/s, 64 at a time, exact", "exact"),
    ("build time", "build, s"),
    ("build time, plain FAISS", "plain FAISS, s"),
    ("longest pause while building", "longest pause, ms"),
)


def block(name: str, columns: Sequence[tuple[str, str]]) -> Callable[[Path], str]:
    """The block of a result, one line a case."""
    return lambda root: pivot(root / "benchmarks" / "results" / f"{name}.json", columns)


THROWN = (
    ("kill -9 at failpoints", "kills", ("rows acknowledged",), ("acknowledged rows lost", "rows there twice")),
    ("flipped bits and truncations", "tried", (), ("not found",)),
    ("simulated disk, process and power", "seeds", ("calls",), ("seeds with an answer taken back",)),
    ("mutated input", "tried", ("decoders",), ("neither taken nor refused",)),
    (
        "abuse of raw sockets",
        "kinds of attack",
        ("calls: sent", "metrics: sent", "descriptors: sent"),
        ("rise of memory at most", "memory left behind", "threads left behind", "descriptors left behind"),
    ),
    ("seeded bugs", "planted", (), ("not caught",)),
)
"""Case, what was thrown, what more is to be said of it, and what may have come of it."""


def reliability(root: Path) -> str:
    """What was thrown at a server, and what was lost."""
    file = root / "benchmarks" / "results" / "reliability.json"
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    found = {(row["case"], row["figure"]): row for row in result["rows"]}

    def told(case: str, figures: Sequence[str]) -> str:
        rows = [found[case, figure] for figure in figures if (case, figure) in found]
        return "; ".join(f"{row['figure']}: {_amount(row)}" for row in rows)

    body = [
        (case, told(case, (thrown, *more)), told(case, lost))
        for case, thrown, more, lost in THROWN
        if (case, thrown) in found
    ]
    table = _table(("what", "thrown", "lost"), body)
    return f"{table}\n\n{result['machine']}; commit {result['commit'][:COMMIT_DIGITS]}; `{result['command']}`."


def _amount(row: dict[str, Any]) -> str:
    unit = "" if row["unit"] == "count" else f" {row['unit']}"
    return f"{row['value']:,.0f}{unit}"


def pivot(file: Path, columns: Sequence[tuple[str, str]]) -> str:
    """Some figures of a result, one line a case that has the first of them."""
    if not file.exists():
        return f"No `{file.name}` is recorded in this revision."
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    cases: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], {})[row["figure"]] = row["value"]
    columns = [column for column in columns if any(column[0] in figures for figures in cases.values())]
    body = [
        (case, *(f"{figures[name]:,.4g}" if name in figures else "" for name, _ in columns))
        for case, figures in cases.items()
        if columns[0][0] in figures
    ]
    table = _table(("case", *(title for _, title in columns)), body)
    return f"{table}\n\n{result['machine']}; commit {result['commit'][:COMMIT_DIGITS]}; `{result['command']}`."


CHANGE = (
    ("perplexity against baseline", "change, %"),
    ("the same, low end", "low, %"),
    ("the same, high end", "high, %"),
)
QUALITY_COLUMNS = {
    "capacity": (("perplexity", "perplexity"), ("bits a byte", "bits a byte"), *CHANGE),
    "eviction": (("perplexity", "perplexity"), *CHANGE),
    "shorts": (("training loss", "training loss, nats"), ("perplexity against LoRA only", "change, %")),
    "fidelity": (("recall@16", "recall@16"), ("distance of those found / of the nearest", "distance ratio")),
    "domains": (("perplexity", "perplexity"), ("bits a byte", "bits a byte"), *CHANGE),
    "ages": (("share of hits", "share of hits"), ("share of attention", "share of attention")),
    "mentions": (
        ("mentions", "mentions"),
        ("loss, LoRA only", "loss of a mention, LoRA only"),
        ("loss, ours", "with memory"),
    ),
    "trials": (
        ("books against LoRA only", "books, %"),
        ("books, low end", "low, %"),
        ("books, high end", "high, %"),
        ("code against LoRA only", "code, %"),
        ("code, low end", "low, % "),
        ("code, high end", "high, % "),
        ("steps a second", "steps/s"),
    ),
    "recall": (("tokens right", "tokens right, %"), ("answers right", "answers right, %"), ("loss", "nats a token")),
    "cost": (("time a token", "time a token, us"), ("bytes kept a token", "bytes kept a token")),
}
"""Table of docs/quality.md -> figures of its result and how they are headed."""


def corpus_packages(root: Path) -> str:
    """Every package of the training text with its licence and how much of it was taken."""
    packages = json.loads((root / "integration" / "training" / "corpus.json").read_text(encoding="utf-8"))
    total = sum(package["num_bytes"] for package in packages)
    body = [
        (
            f"`{package['id']}`",
            package["split"],
            package["licence"],
            f"{package['num_files']:,}",
            f"{package['num_bytes'] / 1e3:,.0f}",
        )
        for package in packages
    ]
    return "\n\n".join(
        [
            f"{len(packages)} packages, {total / 1e6:.1f} MB of source.",
            _table(("package", "split", "licence, as its metadata names it", "files", "kB"), body),
        ]
    )


BASE_TEXT = Path("integration/training/disjoint.json")
ADAPTER_TEXT = Path("benchmarks/quality/disjoint.json")


def disjoint(file: Path) -> Callable[[Path], str]:
    """How much of the demo's texts, and of all the standard library, is in a training text. file: what was measured."""
    return lambda root: _overlap(json.loads((root / file).read_text(encoding="utf-8")))


def _overlap(found: dict[str, Any]) -> str:
    texts = [("read", found["read_text"]), ("control", found["other_text"])]
    body = [
        (
            f"{name}: {', '.join(f'`{package}`' for package in text['packages'])}",
            f"{text['num_files']:,}",
            f"{text['num_shingles']:,}",
            f"{text['shingles_in_training_ratio']:.2%}",
            f"`{text['worst_file']}` {text['worst_file_ratio']:.0%}",
        )
        for name, text in texts
    ]
    ratio = f"{found['stdlib_shingles_in_training_ratio']:.3%}"
    body.append(("the whole library", f"{found['num_stdlib_files']:,}", f"{found['num_stdlib_shingles']:,}", ratio, ""))
    head = ("text of the demo", "files", "shingles", "of them in the training text", "file with the largest share")
    modules = ", ".join(found["modules_in_training"]) or "none"
    told = f"Python {found['python']}; {found['num_training_files']:,} training files."
    return "\n\n".join([_table(head, body), f"{told} Modules of the library among them, by name: {modules}."])


BLOCKS: Sequence[tuple[str, str, Callable[[Path], str]]] = (
    ("README.md", "DEMO_NUMBERS", demo_numbers),
    ("benchmarks/README.md", "BENCHMARK_RESULTS", benchmark_results),
    ("docs/performance.md", "SEARCH", block("search", SEARCH_COLUMNS)),
    ("docs/performance.md", "GPU_SEARCH", block("gpu-search", GPU_SEARCH_COLUMNS)),
    ("docs/performance.md", "PLANES", block("planes", PLANE_COLUMNS)),
    ("docs/performance.md", "GPU_PLANES", block("gpu-planes", PLANE_COLUMNS)),
    ("docs/performance.md", "LARGE", block("large", LARGE_COLUMNS)),
    ("docs/performance.md", "GPU_LARGE", block("gpu-large", LARGE_COLUMNS)),
    ("docs/performance.md", "GPU_LARGE_10M", block("gpu-large-10m", LARGE_COLUMNS)),
    ("docs/operations.md", "RELIABILITY", reliability),
    ("docs/data.md", "DISJOINT", disjoint(BASE_TEXT)),
    ("docs/data.md", "DISJOINT_ADAPTER", disjoint(ADAPTER_TEXT)),
    ("docs/data.md", "CORPUS_PACKAGES", corpus_packages),
    *(
        ("docs/quality.md", f"QUALITY_{name.upper()}", block(f"quality-{name}", columns))
        for name, columns in QUALITY_COLUMNS.items()
    ),
)
"""Document, mark, and what stands between the two marks."""


def stale(root: Path, *, is_written: bool = False) -> list[str]:
    """The blocks that are not what they would be, as `document: mark`; with `is_written` they are made so."""
    found = []
    for name, mark, render in BLOCKS:
        document = root / name
        text = document.read_text(encoding="utf-8")
        opening, closing = f"<!-- {mark}: written by tools/update_readme.py -->\n", f"<!-- /{mark} -->\n"
        before, _, rest = text.partition(opening)
        _, found_closing, after = rest.partition(closing)
        if not found_closing:
            raise SystemExit(f"{name}: the marks of {mark} are missing")
        wanted = f"{before}{opening}\n{render(root)}\n\n{closing}{after}"
        if wanted != text:
            found.append(f"{name}: {mark}")
            if is_written:
                document.write_text(wanted, encoding="utf-8")
    return found


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder of a run of the demo to take over")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something is stale")
    options = parser.parse_args()
    if options.report:
        shutil.copyfile(options.report / "report.json", ROOT / "docs" / "demo.json")
        shutil.copyfile(options.report / "report.png", ROOT / "docs" / "demo.png")
    names = stale(ROOT, is_written=not options.check)
    if options.check and names:
        sys.exit(f"stale: {', '.join(names)}; run tools/update_readme.py")
    print("\n".join(names) or "nothing to write")


if __name__ == "__main__":
    main()
