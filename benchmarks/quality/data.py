"""The texts of the quality benchmarks as token ids: `python -m benchmarks.quality.data` makes them, `load` reads them.

domains: books (train, validation, test by author), code (packages; no package in two splits) and docs (technical prose:
documentation that comes with Debian and Python packages, test only). One document is one book, one package, one tree.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.quality.planting import word_lists
from integration.training.disjoint import read_documents, read_names
from integration.training.documents import Documents
from integration.training.tokenizer import END_OF_TEXT, pieces, save, train

VOCAB_SIZE = 8_192
SAMPLE_BYTES = 12_000_000
MAX_HELD_OUT = 136 * 1024  # tokens of a document that is not trained on; no table reads more
SPLITS = (("books", "train"), ("books", "validation"), ("books", "test"), ("code", "train"), ("code", "validation"))
SPLITS += (("code", "test"), ("docs", "test"))


@dataclass(frozen=True, slots=True)
class Windows:
    """The first `length` tokens and one of each document that is long enough.

    ids: (documents, length + 1) int64. names: theirs. num_bytes: (documents,) UTF-8 bytes of the tokens but the first.
    """

    ids: np.ndarray
    names: list[str]
    num_bytes: np.ndarray


def load(folder: Path, domain: str, split: str) -> tuple[Documents, list[str]]:
    """The documents of one split and their names."""
    unpacked = folder / f"{domain}-{split}.u16"
    if unpacked.exists():
        ids = np.fromfile(unpacked, np.uint16)
    else:
        with lzma.open(f"{unpacked}.xz") as stream:
            ids = np.frombuffer(stream.read(), np.uint16)
    described = json.loads((folder / f"{domain}-{split}.json").read_text())
    return Documents(ids, np.array(described["splits"], np.int64)), described["names"]


def windows(folder: Path, domain: str, split: str, length: int, max_documents: int = 64) -> Windows:
    """Documents to read in lockstep; raises ValueError where none is long enough."""
    documents, names = load(folder, domain, split)
    begins, ends = documents.splits[:-1], documents.splits[1:]
    chosen = [number for number in range(len(names)) if ends[number] - begins[number] > length][:max_documents]
    if not chosen:
        raise ValueError(f"{domain}-{split}: no document has {length + 1} tokens")
    ids = np.stack([documents.ids[begins[n] : begins[n] + length + 1] for n in chosen]).astype(np.int64)
    widths = np.array(json.loads((folder / "token_bytes.json").read_text()), np.int64)
    return Windows(ids, [names[n] for n in chosen], widths[ids[:, 1:]].sum(axis=1))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens; END_OF_TEXT is token 0."""
    return train(iter(texts), VOCAB_SIZE)


def token_bytes(tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes of each token: a byte-level token has one character a byte."""
    vocabulary = tokenizer.get_vocab()
    named = sorted(vocabulary, key=vocabulary.__getitem__)
    return [0 if name == END_OF_TEXT else len(name) for name in named]


def write_split(tokenizer: Tokenizer, documents: list[dict[str, str]], stem: Path, max_tokens: int | None) -> int:
    """Writes ids and names of a split; gives its number of tokens. Each document is closed by END_OF_TEXT."""
    end, flat, splits = tokenizer.token_to_id(END_OF_TEXT), [], [0]
    for document in documents:
        encoded = tokenizer.encode_batch_fast(list(pieces(document["text"])), add_special_tokens=False)
        ids = np.concatenate([np.array(each.ids, np.uint16) for each in encoded] + [np.array([end], np.uint16)])
        flat.append(ids if max_tokens is None else ids[:max_tokens])
        splits.append(splits[-1] + len(flat[-1]))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20, "lc": 0, "lp": 1, "pb": 1}]
    with lzma.open(f"{stem}.u16.xz", "wb", filters=filters) as stream:
        stream.write(np.concatenate(flat).tobytes())
    names = [document["id"] for document in documents]
    Path(f"{stem}.json").write_text(json.dumps({"names": names, "splits": splits}))
    return splits[-1]


def documentation(roots: list[Path], max_bytes: int = 4_000_000) -> list[dict[str, str]]:
    """One document for each folder of technical prose: its .txt, .rst, .md and .pod files, joined."""
    found = []
    for root in roots:
        files = [f for f in sorted(root.rglob("*")) if f.suffix in (".txt", ".rst", ".md", ".pod") and f.is_file()]
        text = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)[:max_bytes]
        if text:
            found.append({"id": root.name, "text": text})
    return found


def sampled(texts: dict[tuple[str, str], list[dict[str, str]]], seed: int) -> list[str]:
    """Pieces of the training documents, as many bytes of each domain."""
    sample = []
    for domain in ("books", "code"):
        cut = [piece for document in texts[domain, "train"] for piece in pieces(document["text"], 8_192)]
        random.Random(seed).shuffle(cut)
        sample += cut[: SAMPLE_BYTES // 8_192]
    return sample


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True, help="folder of train, validation and test.jsonl.xz")
    parser.add_argument("--code", type=Path, required=True, help="folder that integration.training.corpus wrote")
    parser.add_argument(
        "--docs", type=Path, nargs="*", default=[], help="folders of technical prose, one document each"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use instead of learning one")
    parser.add_argument("--book-tokens", type=int, help="of each training book at most")
    parser.add_argument("--code-tokens", type=int, help="of each training package at most")
    parser.add_argument("--packages", type=Path, help="file that names the packages to train on; all, by default")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def chosen(documents: list[dict[str, str]], names: Path | None) -> list[dict[str, str]]:
    """The documents that a file names, a line each, in its order; all of them without one."""
    if names is None:
        return documents
    by_name = {document["id"]: document for document in documents}
    return [by_name[name] for name in read_names(names)]


def main() -> int:
    """Learns the tokenizer from the training splits and writes every split as ids."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    texts: dict[tuple[str, str], list[dict[str, str]]] = {}
    for domain, split in SPLITS[:-1]:
        path = options.books / f"{split}.jsonl.xz" if domain == "books" else options.code / f"code-{split}.jsonl.xz"
        texts[domain, split] = list(read_documents(path))
    texts["code", "train"] = chosen(texts["code", "train"], options.packages)
    train, probe = word_lists([document["text"] for document in texts["books", "train"]])
    (options.out / "words.json").write_text(json.dumps({"train": train, "probe": probe}))
    texts["docs", "test"] = documentation(options.docs)
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(str(options.tokenizer))
    else:
        tokenizer = train_tokenizer(sampled(texts, options.seed))
    save(tokenizer, options.out)
    (options.out / "token_bytes.json").write_text(json.dumps(token_bytes(tokenizer)))
    for (domain, split), documents in texts.items():
        if documents:
            limits = {"books": options.book_tokens, "code": options.code_tokens}
            most = limits[domain] if split == "train" else MAX_HELD_OUT
            num_tokens = write_split(tokenizer, documents, options.out / f"{domain}-{split}", most)
            num_bytes = sum(len(document["text"].encode()) for document in documents)
            print(f"{domain}-{split}: {len(documents)} documents, {num_tokens} tokens, {num_bytes} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
