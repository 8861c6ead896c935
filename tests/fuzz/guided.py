"""Fuzzing that is guided by what it covers: `python -m tests.fuzz.guided TARGET [--seconds S] [--corpus FOLDER]`.

Atheris (libFuzzer) keeps the inputs that reach something new, in the corpus folder, and goes on from them. It ends with
exit code 0 when the time is over, and otherwise with the input that a decoder had no answer to. `--list` names targets.
Needs the extra "soak".
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import atheris

with atheris.instrument_imports(include=["memstore", "integration", "model_client"]):
    from tests.fuzz.mutating import mutated
    from tests.fuzz.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.fuzz.target import Target

LONGEST = 1 << 16
OWN_RATIO = 0.5
"""Share of the inputs that the target changes in its own manner, such as JSON by its values."""


def fuzz(target: Target, seconds: int, corpus: Path) -> None:
    """Fuzzes one target; never returns."""
    for seed in target.seeds:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if target.mutate is not mutated and random.random() < OWN_RATIO:
            try:
                return target.mutate(content, random)[:max_size]
            except (ValueError, TypeError, LookupError, RecursionError):  # what the corpus has is no JSON any more
                return target.mutate(random.choice(target.seeds), random)[:max_size]
        return bytes(atheris.Mutate(content, max_size))

    flags = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=30", "-rss_limit_mb=4096", str(corpus)]
    atheris.Setup([sys.argv[0], *flags], target.run, custom_mutator=mutate)
    atheris.Fuzz()


def main(arguments: Sequence[str]) -> int:
    """Fuzzes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*TARGETS], nargs="?")
    parser.add_argument("--list", action="store_true", help="name all targets")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="where inputs that reach something new are kept, and found again")
    options = parser.parse_args(arguments)
    if options.list or options.target is None:
        sys.stdout.write("\n".join(TARGETS) + "\n")
        return 0
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="memstore-corpus-"))
    corpus.mkdir(parents=True, exist_ok=True)
    fuzz(TARGETS[options.target](Path(tempfile.mkdtemp(prefix="memstore-fuzz-"))), options.seconds, corpus)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
