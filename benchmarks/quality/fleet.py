"""Fleet: trials trained side by side on one GPU, and read on validation documents by the same network.

Each trial has a thread and a stream. One is built or read at a time, while the others train.
"""

from __future__ import annotations

import gc
import json
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.quality.streams import DOMAINS
from benchmarks.quality.table import percent
from benchmarks.quality.training import Training, Trial

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.quality.streams import Corpus

LOG = "trials.jsonl"
MAX_RESERVED = 90 << 30


class Fleet:
    """Threads that take trials from a list, best first, until the time is over."""

    def __init__(self, base: Path, corpus: Corpus, out: Path, *, workers: int = 2, length: int = 65_536) -> None:
        self.corpus, self.out, self.workers, self.length = corpus, out, workers, length
        self.template: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).to(corpus.device)
        self.found: dict[str, dict[str, Any]] = {}
        self._building, self._taking = threading.Lock(), threading.Lock()
        self.failures = 0

    def run(
        self, trials: list[Trial], until: float, capacities: tuple[int, ...] = (16_384,), keep: bool = False
    ) -> None:
        """Trains and reads as many as there is time for. keep: saves their weights."""
        waiting = list(trials)

        def work() -> None:
            while time.monotonic() < until:
                with self._taking:
                    if not waiting:
                        return
                    trial = waiting.pop(0)
                try:
                    self._one(trial, until, capacities, keep)
                except Exception:
                    traceback.print_exc()
                    self.failures += 1

        threads = [threading.Thread(target=work) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, trial: Trial, until: float, capacities: tuple[int, ...], keep: bool) -> None:
        begun = time.monotonic()
        with self._building:
            training = Training(trial, self.template, self.corpus)
        with training.on_its_stream():
            with self._building:
                training.capture()
            built = time.monotonic()
            folder = self.out / trial.name if keep else None
            report = training.run(until, folder)
            row = {"name": trial.name, "build_s": round(built - begun, 1)} | report
            trained = time.monotonic()
            for capacity in capacities:
                with self._building:
                    row[f"read_{capacity}"] = training.read(capacity, self.length)
            row["read_s"] = round(time.monotonic() - trained, 1)
        self._tell(row, capacities)
        with self._building:
            training.close()
            gc.collect()
            if self.corpus.device.type == "cuda" and torch.cuda.memory_reserved() > MAX_RESERVED:
                torch.cuda.empty_cache()  # waits for all that runs

    def _tell(self, row: dict[str, Any], capacities: tuple[int, ...]) -> None:
        """Logs a row, and prints it with its change against `lora` where that is known."""
        if capacities:
            row |= {domain: float(np.mean(row[f"read_{capacities[0]}"][domain])) for domain in DOMAINS}
        self.found[row["name"]] = row
        with self._taking, (self.out / LOG).open("a") as log:
            log.write(json.dumps(row) + "\n")
        known = [domain for domain in DOMAINS if domain in row and domain in self.found.get("lora", {})]
        changes = [f"{domain} {percent(row[domain] - self.found['lora'][domain]):+.2f}%" for domain in known]
        print(
            f"{row['name']}: {row['steps']} steps, {row['steps_per_s']}/s, built in {row['build_s']} s, read in "
            f"{row['read_s']} s, books {row.get('books', 0):.4f}, code {row.get('code', 0):.4f} {' '.join(changes)}",
            flush=True,
        )
