"""Disjointness of the training text from the standard library and the demo's texts, measured by shared shingles.

A shingle is five consecutive non-blank lines, each stripped of white space, as one uint64.
"""

import argparse
import json
import lzma
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from integration.demo.text import OTHER_PACKAGES, READ_PACKAGES, library_files

Shingles = NDArray[np.uint64]

LINES_PER_SHINGLE = 5
FILE_MARK = "# file: "
# Odd multipliers keep the order of lines in the sum: x*a + y*b differs from y*a + x*b.
_WEIGHTS = np.array([2 * 0x9E3779B97F4A7C15 * k + 1 & 2**64 - 1 for k in range(1, 6)], np.uint64)


def shingles(text: str) -> Shingles:
    """The distinct shingles of `text`, sorted, (n,) uint64; empty below five non-blank lines."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    num_shingles = len(lines) - LINES_PER_SHINGLE + 1
    if num_shingles < 1:
        return np.empty(0, np.uint64)
    digests = b"".join(blake2b(line.encode(), digest_size=8).digest() for line in lines)
    hashes = np.frombuffer(digests, "<u8")
    total = np.zeros(num_shingles, np.uint64)
    for offset, weight in enumerate(_WEIGHTS):
        total += hashes[offset : offset + num_shingles] * weight
    return np.unique(total)


def shared_ratio(part: Shingles, whole: Shingles) -> float:
    """The share of `part`'s shingles that `whole` (sorted) also holds; 0 for an empty part."""
    if not part.size or not whole.size:
        return 0.0
    places = np.minimum(np.searchsorted(whole, part), whole.size - 1)
    return float(np.mean(whole[places] == part))


def union(parts: Iterable[Shingles]) -> Shingles:
    """The distinct shingles of all the parts, sorted."""
    held = list(parts)
    return np.unique(np.concatenate(held)) if held else np.empty(0, np.uint64)


def running_stdlib() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_texts(root: Path) -> Iterator[str]:
    """The text of every *.py file of a standard library, in path order, installed packages out."""
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def split_files(document: str) -> Iterator[tuple[str, str]]:
    """The (path, text) of each file of a document whose files open with a `# file: path` line."""
    path, lines = "", list[str]()
    for line in document.splitlines(keepends=True):
        if line.startswith(FILE_MARK):
            if path:
                yield path, "".join(lines)
            path, lines = line.removeprefix(FILE_MARK).strip(), []
        else:
            lines.append(line)
    if path:
        yield path, "".join(lines)


def read_documents(path: Path) -> Iterator[dict[str, str]]:
    """The documents of a .jsonl.xz file, in order: at least `id` and `text` each."""
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def read_names(path: Path) -> list[str]:
    """The names of documents that a file gives, a line each, without its comments."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOverlap:
    """How much of one text is in the training text: of all its distinct shingles, and of those of its worst file."""

    packages: Sequence[str]
    num_files: int
    num_shingles: int
    shingles_in_training_ratio: float
    worst_file: str
    worst_file_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How much of a standard library is in the training text; ratios are of shingles or files.

    modules_in_training: names of the library's modules that a folder or file at the top of a training document has.
    read_text, other_text: the two texts of the demo.
    """

    python: str
    num_stdlib_files: int
    num_training_files: int
    num_stdlib_shingles: int
    num_training_shingles: int
    stdlib_shingles_in_training_ratio: float
    worst_training_file_ratio: float
    stdlib_files_over_5_percent: int
    modules_in_training: Sequence[str]
    read_text: TextOverlap
    other_text: TextOverlap


def measure(library: Path, training: Sequence[tuple[str, str]], python: str) -> Overlap:
    """The overlap of a standard library's folder and the (path, text) of the training files."""
    stdlib = [shingles(text) for text in stdlib_texts(library)]
    trained = [shingles(text) for _, text in training]
    all_stdlib, all_training = union(stdlib), union(trained)
    names = {path.split("/")[0].removesuffix(".py") for path, _ in training}
    return Overlap(
        python=python,
        num_stdlib_files=len(stdlib),
        num_training_files=len(trained),
        num_stdlib_shingles=all_stdlib.size,
        num_training_shingles=all_training.size,
        stdlib_shingles_in_training_ratio=shared_ratio(all_stdlib, all_training),
        worst_training_file_ratio=max((shared_ratio(f, all_stdlib) for f in trained), default=0.0),
        stdlib_files_over_5_percent=sum(shared_ratio(f, all_training) > 0.05 for f in stdlib),
        modules_in_training=sorted(names & sys.stdlib_module_names),
        read_text=measure_text(READ_PACKAGES, library, all_training),
        other_text=measure_text(OTHER_PACKAGES, library, all_training),
    )


def measure_text(packages: tuple[str, ...], library: Path, training: Shingles) -> TextOverlap:
    """The overlap of the demo's text of these packages with the shingles of all training files."""
    files = library_files(packages, library)
    parts = [shingles(file.read_text(encoding="utf-8", errors="replace")) for file in files]
    whole = union(parts)
    worst, name = max(
        (shared_ratio(part, training), str(file.relative_to(library))) for part, file in zip(parts, files, strict=True)
    )
    return TextOverlap(
        packages=packages,
        num_files=len(files),
        num_shingles=whole.size,
        shingles_in_training_ratio=shared_ratio(whole, training),
        worst_file=name,
        worst_file_ratio=worst,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of code-*.jsonl.xz")
    parser.add_argument("--packages", type=Path, help="file that names the packages to look at; all, by default")
    parser.add_argument("--report", type=Path, help="JSON file to write")
    parser.add_argument("--limit", type=float, default=0.01, help="share that fails the check")
    return parser.parse_args()


def main() -> int:
    """Checks a corpus against the running interpreter's library; 1 where it overlaps too much."""
    options = parse_arguments()
    named = read_names(options.packages) if options.packages else None
    training = [
        file
        for path in sorted(options.corpus.glob("code-*.jsonl.xz"))
        for document in read_documents(path)
        if named is None or document["id"] in named
        for file in split_files(document["text"])
    ]
    overlap = measure(running_stdlib(), training, platform.python_version())
    report = json.dumps(asdict(overlap), indent=2) + "\n"
    if options.report:
        options.report.write_text(report)
    sys.stdout.write(report)
    ratios = (text.shingles_in_training_ratio for text in (overlap.read_text, overlap.other_text))
    return int(max(overlap.stdlib_shingles_in_training_ratio, *ratios) > options.limit)


if __name__ == "__main__":
    sys.exit(main())
