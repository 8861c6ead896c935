"""The training text: permissively licensed Python packages, one document each, no stdlib in it."""

import argparse
import hashlib
import json
import lzma
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from integration.training.disjoint import (
    FILE_MARK,
    Shingles,
    running_stdlib,
    shared_ratio,
    shingles,
    stdlib_texts,
    union,
)
from integration.training.packages import (
    Package,
    Pin,
    canonical,
    download,
    installed,
    is_permissive,
    read_packages,
    read_pins,
    wheel_of,
)

HERE = Path(__file__).parent
MAX_FILE_BYTES = 400_000
MIN_FILE_BYTES = 200
MAX_LINE_CHARS = 200
MAX_STDLIB_RATIO = 0.05
MAX_COPY_RATIO = 0.4
VENDORED = re.compile(r"(^|/)(_?vendor|_?vendored|_?extern|externals?|_bundled|third_party|_distutils)(/|$)")
GENERATED = re.compile(r"(_pb2(_grpc)?\.py|_test_data\.py|Parser\.py|Lexer\.py)$|generated", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was taken of one package; `dropped` counts files by reason."""

    id: str
    split: str
    licence: str
    num_files: int
    num_bytes: int
    dropped: dict[str, int]


class Filter:
    """Decides file by file, in order; remembers what it accepted, so copies are seen."""

    def __init__(self, stdlib: Shingles) -> None:
        """`stdlib`: the sorted shingles that no accepted file may share more than 5% of."""
        self._stdlib = stdlib
        self._accepted = np.empty(0, np.uint64)

    def reason_to_drop(self, path: str, text: str) -> str:
        """Why a file stays out ('' where it is accepted), one word."""
        if reason := shape_reason(path, text):
            return reason
        own = shingles(text)
        if shared_ratio(own, self._stdlib) > MAX_STDLIB_RATIO:
            return "stdlib"
        return "copy" if shared_ratio(own, self._accepted) > MAX_COPY_RATIO else ""

    def remember(self, texts: Sequence[str]) -> None:
        """Holds later packages against these texts."""
        self._accepted = union([self._accepted, *map(shingles, texts)])


def shape_reason(path: str, text: str) -> str:
    """Why a file's path or shape keeps it out, '' where they do not."""
    if VENDORED.search(path):
        return "vendored"
    if GENERATED.search(path):
        return "generated"
    if not MIN_FILE_BYTES <= len(text.encode()) <= MAX_FILE_BYTES:
        return "size"
    is_wide = len(text) / (text.count("\n") + 1) > MAX_LINE_CHARS
    return "wide" if is_wide or max(map(len, text.splitlines())) > 20 * MAX_LINE_CHARS else ""


def sample(files: Sequence[tuple[str, str]], max_bytes: int) -> list[tuple[str, str]]:
    """Whole folders in an order fixed by their names, until `max_bytes`; back in path order."""
    folders = sorted({str(Path(path).parent) for path, _ in files}, key=lambda f: hashlib.sha256(f.encode()).digest())
    place = {folder: n for n, folder in enumerate(folders)}
    left, taken = max_bytes, list[tuple[str, str]]()
    for path, text in sorted(files, key=lambda f: (place[str(Path(f[0]).parent)], f[0])):
        if (left := left - len(text.encode())) < 0:
            break
        taken.append((path, text))
    return sorted(taken)


def take(package: Package, chosen: Filter, max_bytes: int) -> tuple[Row, str]:
    """One package's row of the record and its document."""
    dropped = dict[str, int]()
    kept = list[tuple[str, str]]()
    for path, text in package.files:
        reason = chosen.reason_to_drop(path, text)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            kept.append((path, text))
    files = sample(unlike_each_other(kept), max_bytes)
    dropped["copy"] = dropped.get("copy", 0) + len(kept) - len(files)
    chosen.remember([text for _, text in files])
    document = "".join(f"{FILE_MARK}{path}\n{text.rstrip()}\n\n" for path, text in files)
    row = Row(
        id=f"{package.pin.name}=={package.pin.version}",
        split=package.pin.split,
        licence=package.licence,
        num_files=len(files),
        num_bytes=len(document.encode()),
        dropped={reason: count for reason, count in sorted(dropped.items()) if count},
    )
    return row, document


def unlike_each_other(files: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The files without those that mostly repeat an earlier one of the same package."""
    seen, kept = set[int](), list[tuple[str, str]]()
    for path, text in files:
        own = shingles(text).tolist()
        if sum(s in seen for s in own) <= MAX_COPY_RATIO * len(own):
            seen.update(own)
            kept.append((path, text))
    return kept


def build(packages: Iterator[Package], chosen: Filter, max_bytes: int) -> list[tuple[Row, str]]:
    """Every package's row and document; a licence that is not permissive raises ValueError."""
    built = []
    for package in packages:
        if not is_permissive(package.licence):
            raise ValueError(f"{package.pin.name}: licence {package.licence!r} is not a permissive one")
        built.append(take(package, chosen, max_bytes))
    return built


def write_split(path: Path, built: Sequence[tuple[Row, str]]) -> None:
    """The documents as .jsonl.xz with keys id, licence, text."""
    # A 128 MiB window lets packages be compressed against each other.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 128 << 20}]
    with lzma.open(path, "wt", filters=filters, encoding="utf-8") as stream:
        for row, document in built:
            stream.write(json.dumps({"id": row.id, "licence": row.licence, "text": document}) + "\n")


def fetch(pins: Sequence[Pin], sites: Sequence[Path], wheels: Path) -> None:
    """Downloads what is pinned and neither installed nor downloaded."""
    here = installed(sites)
    missing = [p for p in pins if (canonical(p.name), p.version) not in here and not wheel_of(p, wheels)]
    download(missing, wheels)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".train/corpus"))
    parser.add_argument("--wheels", type=Path, default=Path(".train/wheels"))
    parser.add_argument("--pins", type=Path, default=HERE / "packages.txt")
    parser.add_argument("--record", type=Path, default=HERE / "corpus.json")
    parser.add_argument("--site", type=Path, action="append", default=[Path(sysconfig.get_paths()["purelib"])])
    parser.add_argument("--stdlib", type=Path, action="append", default=[running_stdlib()])
    parser.add_argument("--max-package-bytes", type=int, default=9_000_000)
    parser.add_argument("--download", action="store_true", help="fetch missing packages with pip")
    return parser.parse_args()


def main() -> int:
    """Builds code-SPLIT.jsonl.xz for each split among the pins and records what is in them."""
    options = parse_arguments()
    # Validation first: a training file that repeats one of its files is then the copy.
    pins = sorted(read_pins(options.pins), key=lambda pin: pin.split, reverse=True)
    options.wheels.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.download:
        fetch(pins, options.site, options.wheels)
    stdlib = union(shingles(text) for root in options.stdlib for text in stdlib_texts(root))
    packages = read_packages(pins, options.site, options.wheels)
    built = build(iter(tqdm(packages, total=len(pins), unit="pkg")), Filter(stdlib), options.max_package_bytes)
    for split in sorted({pin.split for pin in pins}):
        write_split(options.out / f"code-{split}.jsonl.xz", [b for b in built if b[0].split == split])
    rows = [json.dumps(asdict(row)) for row, _ in sorted(built, key=lambda b: b[0].id.lower())]
    options.record.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
