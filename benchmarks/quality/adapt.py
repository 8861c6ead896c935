"""Trains variants beside the frozen base, all for the same steps, and reads each on validation documents.

python -m benchmarks.quality.adapt --base runs/base --data tokens --out runs --variant ours,lora,mt --steps 3000
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.quality.fleet import Fleet
from benchmarks.quality.streams import Corpus
from benchmarks.quality.training import Trial


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--variant", required=True, help="names of benchmarks/quality/variants.py, joined by commas")
    parser.add_argument("--out", type=Path, required=True, help="a folder a variant, and trials.jsonl")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=1e9, help="stops where it is then")
    parser.add_argument("--batch", type=int, default=32, help="documents read at once")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--lora-rate", type=float, default=5e-4)
    parser.add_argument("--renamed", type=float, default=0.0, help="share of books with exchanged names")
    parser.add_argument("--planted", action="store_true", help="books with planted facts")
    parser.add_argument("--begin", default="", help="adapter folder to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", default="{}", help="JSON: changes that all variants share")
    parser.add_argument("--name", default="", help="of the folder, where there is one variant")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side")
    parser.add_argument("--length", type=int, default=65_536, help="tokens of each validation document that are read")
    parser.add_argument("--capacities", type=int, nargs="*", default=[16_384], help="of these readings")
    return parser


def trials(options: argparse.Namespace) -> list[Trial]:
    """What the command line asks for."""
    same = ("steps", "batch", "rate", "lora_rate", "renamed", "planted", "begin", "seed")
    given = {key: getattr(options, key) for key in same} | {"changes": json.loads(options.shared)}
    names = options.variant.split(",")
    return [Trial(name=options.name or name, variant=name, **given) for name in names]


def main() -> int:
    """Trains all that is asked for; 1 where one failed."""
    options = parser().parse_args()
    torch.set_float32_matmul_precision("high")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = Corpus(options.data, device, options.length)
    fleet = Fleet(options.base, corpus, options.out, workers=options.workers, length=options.length)
    fleet.run(trials(options), time.monotonic() + options.seconds, tuple(options.capacities), keep=True)
    return int(fleet.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
