"""What does a memory cost a model that decodes? Tokens a second with it, against the same model without.

The model is Llama-shaped, with a billion parameters on a GPU and a toy's on the host, and random weights: it is the
time that counts. Its sequences have full memories. Each token of each sequence is looked up at the retrieval layer,
while the layers up to the cache attention run. Two forms are measured: the default one, where all layers above the
retrieval layer attend, and one where a single layer attends and half of the model lies between it and the retrieval.
The bare model and the model with a memory, in its process and then of a server on this host, come in turn; shares are
medians over the rounds. What a loop of passes records at its beginning is done before the time is taken.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.report import Report
from integration import MemoryConfig, attach
from integration.config import DTYPES
from integration.demo.server import running_server
from model_client import MemoryClient

BARE = "no memory"
LEAST_SHARE = 0.97
TIMEOUT_S = 60.0
APPENDED_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Size:
    """The model, as LlamaConfig calls its parts; sequences, live rows of each; the prompt; tokens that are timed, and
    those before them, in which what is recorded for a loop is recorded.
    """

    model: dict[str, int]
    num_sequences: int
    capacity: int
    prompt: int
    num_first: int
    num_tokens: int
    rounds: int

    def __str__(self) -> str:
        width, depth = self.model["hidden_size"], self.model["num_hidden_layers"]
        return f"{depth} layers of {width}, {self.num_sequences} x {self.capacity}"


BILLION = Size(
    model={
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
    },
    num_sequences=8,
    capacity=65_536,
    prompt=64,
    num_first=8,
    num_tokens=64,
    rounds=6,
)
TOY = Size(
    model={
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 256,
    },
    num_sequences=2,
    capacity=64,
    prompt=4,
    num_first=4,
    num_tokens=4,
    rounds=2,
)


class Decoding:
    """A model that decodes, greedily, the same number of tokens again and again."""

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(1)
        config = LlamaConfig(**size.model)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.device(device):
            self.model = LlamaForCausalLM(config).to(dtype).eval()
        self.size = size
        self._prompt = torch.randint(size.model["vocab_size"], (size.num_sequences, size.prompt), device=device)
        self.names = [f"s{number}" for number in range(size.num_sequences)]

    def config(self, name: str, **changes: Any) -> MemoryConfig:
        """Of a memory of the size that is measured."""
        size = self.size
        shape = {"capacity": size.capacity, "max_sequences": size.num_sequences, "segment_length": size.num_tokens}
        return MemoryConfig.for_model(self.model, memory=name, **shape, **changes)

    def fill(self, client: MemoryClient, config: MemoryConfig) -> None:
        """Appends random rows to all sequences until they are full."""
        options: dict[str, Any] = {"capacity": config.capacity, "max_sequences": config.max_sequences}
        client.create_memory(config.memory, dim=config.dim, dtype=DTYPES[config.dtype], metric=config.metric, **options)
        session = client.session(config.memory, self.names)
        for first in range(0, config.capacity, APPENDED_ROWS):
            num_rows = min(APPENDED_ROWS, config.capacity - first)
            rows = torch.randn(len(self.names) * num_rows, config.dim, device=self.model.device, dtype=torch.float16)
            session.append(rows, [num_rows] * len(self.names))

    @torch.inference_mode()
    def seconds_a_token(self) -> float:
        """Of a decode step: what a token of every sequence takes, in the mean."""
        cache = DynamicCache(config=self.model.config)
        token = self._next(self._prompt, cache)
        for _ in range(self.size.num_first):
            token = self._next(token, cache)
        self._await()
        begun = time.perf_counter()
        for _ in range(self.size.num_tokens):
            token = self._next(token, cache)
        self._await()
        return (time.perf_counter() - begun) / self.size.num_tokens

    def _next(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def _await(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def measure(decoding: Decoding, clients: dict[str, MemoryClient], report: Report) -> None:
    """Adds the rows of one model. clients: of memories, by the names that they have in the report."""
    size = decoding.size
    depth = size.model["num_hidden_layers"]
    forms: dict[str, dict[str, Any]] = {
        "all layers above attend": {},
        "one layer attends": {"retrieval_layer": depth // 2 - 1, "attention_layers": (depth - 1,)},
    }
    for name, client in clients.items():
        memory = name.replace(" ", "-")
        decoding.fill(client, decoding.config(memory))
        for form, changes in forms.items():
            pairs, share = _in_turn(decoding, client, decoding.config(memory, **changes))
            _add(f"{size}, {form}", name, pairs, share, report)
        client.drop_memory(memory)


def _in_turn(decoding: Decoding, client: MemoryClient, config: MemoryConfig) -> tuple[list[tuple[float, float]], float]:
    """Seconds of a token without memory and with it, round by round; the share of forwards that had their rows."""
    pairs, forwards = [], [0, 0]
    for _ in range(decoding.size.rounds + 1):  # the first one warms up
        bare = decoding.seconds_a_token()
        with attach(decoding.model, client, config, sequences=decoding.names) as memory:
            pairs.append((bare, decoding.seconds_a_token()))
        forwards[0] += memory.stats.steps_with_memory
        forwards[1] += memory.stats.steps_without_memory
    return pairs[1:], forwards[0] / max(sum(forwards), 1)


def _add(case: str, name: str, pairs: list[tuple[float, float]], share: float, report: Report) -> None:
    bare, own = (statistics.median(times) for times in zip(*pairs, strict=True))
    report.add(case, f"step, {BARE}, beside {name}", bare * 1e3, "ms")
    report.add(case, f"step, {name}", own * 1e3, "ms")
    report.add(case, f"forwards with their rows, {name}", share, "ratio", better="higher")
    ratio = statistics.median(without / with_it for without, with_it in pairs)
    report.add(case, f"tokens/s / {BARE}, {name}", ratio, "ratio", goal=LEAST_SHARE, better="higher")


def main() -> None:
    """Measures the billion on a GPU where there is one, else the toy on the host, whose figures say nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the toy, and nothing is written")
    options = parser.parse_args()
    is_large = torch.cuda.is_available() and not options.quick
    report, device = Report("gpu-decode"), torch.device("cuda" if is_large else "cpu")
    with ExitStack() as held, ThreadPoolExecutor(1) as aside:
        starting = aside.submit(held.enter_context, running_server())  # takes as long as all up to the first figures
        decoding = Decoding(BILLION if is_large else TOY, device)
        with MemoryClient(timeout_s=TIMEOUT_S, device=device.type) as local:
            measure(decoding, {"in process": local}, report)
        if is_large:
            print(report.write(), flush=True)
        with MemoryClient(starting.result(), timeout_s=TIMEOUT_S) as remote:
            measure(decoding, {"server": remote}, report)
    if is_large:
        print(report.write())


if __name__ == "__main__":
    main()
