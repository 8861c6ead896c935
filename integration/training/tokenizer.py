"""The base model's tokenizer: byte-level BPE of 4096 tokens, lossless on any text."""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from integration.training.disjoint import read_documents, running_stdlib, stdlib_texts

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
# GPT-4's split, but digits stay in pairs, and a line end takes the next line's indentation with it.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
)


def new_tokenizer() -> Tokenizer:
    """A byte-level BPE without merges."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer of so many tokens learned from `texts`; END_OF_TEXT is token 0."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = new_tokenizer()
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pieces(text: str, size: int = 65_536) -> Iterator[str]:
    """`text` in pieces of about `size` characters that end where a line ends."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) if start + size < len(text) else -1
        stop = len(text) if end < 0 else end
        yield text[start:stop]
        start = stop


def sampled(path: Path, num_bytes: int, seed: int) -> list[str]:
    """Pieces of the documents of a .jsonl.xz file, about `num_bytes` characters in all."""
    cut = [piece for document in read_documents(path) for piece in pieces(document["text"])]
    random.Random(seed).shuffle(cut)  # noqa: S311
    return cut[: max(1, num_bytes // 65_536)]


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """UTF-8 bytes a token; raises ValueError where a text does not come back byte for byte."""
    num_bytes = num_tokens = 0
    for text in texts:
        ids = tokenizer.encode(text).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise ValueError("a text was not restored from its tokens")
        num_bytes, num_tokens = num_bytes + len(text.encode()), num_tokens + len(ids)
    return num_bytes / num_tokens


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", type=Path, default=Path(".train/corpus"))
    parser.add_argument("--books", type=Path, required=True, help="folder of the books' .jsonl.xz")
    parser.add_argument("--out", type=Path, default=Path(".train/tokenizer"))
    parser.add_argument("--code-bytes", type=int, default=24_000_000)
    parser.add_argument("--books-bytes", type=int, default=6_000_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Trains the tokenizer, saves it and writes what it reaches on held-out text."""
    options = parse_arguments()
    code = sampled(options.code / "code-train.jsonl.xz", options.code_bytes, options.seed)
    books = sampled(options.books / "train.jsonl.xz", options.books_bytes, options.seed)
    tokenizer = train(iter(code + books))
    save(tokenizer, options.out)
    held_out = {
        "stdlib": [text for _, text in zip(range(400), stdlib_texts(running_stdlib()), strict=False)],
        "code": sampled(options.code / "code-validation.jsonl.xz", 2_000_000, options.seed),
        "books": sampled(options.books / "validation.jsonl.xz", 2_000_000, options.seed),
    }
    reached = {name: round(bytes_per_token(tokenizer, texts), 3) for name, texts in held_out.items()}
    sys.stdout.write(json.dumps({"vocab": tokenizer.get_vocab_size(), "bytes_per_token": reached}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
