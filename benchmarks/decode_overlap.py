"""What does a memory cost a model that decodes? Tokens a second with it, against the same model without.

The model is Llama-shaped, with a billion parameters on a GPU and a toy's on the host, and random weights: it is the
time that counts. Its sequences have full memories. Each token of each sequence is looked up at the retrieval layer,
while the layers up to the cache attention run. Two forms are measured: the default one, where all layers above the
retrieval layer attend, and one where a single layer attends and half of the model lies between it and the retrieval.
The bare model, the model with a memory in its process, and with that of a server on this host come in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.report import Report
from integration import MemoryConfig, attach
from integration.config import DTYPES
from integration.demo.server import running_server
from model_client import MemoryClient

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from integration.attach import AttachedMemory

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
    rounds=5,
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
        self._size = size
        self._prompt = torch.randint(size.model["vocab_size"], (size.num_sequences, size.prompt), device=device)
        self.names = [f"s{number}" for number in range(size.num_sequences)]

    def config(self, name: str, **changes: Any) -> MemoryConfig:
        """Of a memory of the size that is measured."""
        size = self._size
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
        for _ in range(self._size.num_first):
            token = self._next(token, cache)
        self._await()
        begun = time.perf_counter()
        for _ in range(self._size.num_tokens):
            token = self._next(token, cache)
        self._await()
        return (time.perf_counter() - begun) / self._size.num_tokens

    def _next(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def _await(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def measure(size: Size, device: torch.device, clients: dict[str, MemoryClient], report: Report) -> None:
    """Adds the rows of one size. clients: of memories, by the names that they have in the report."""
    decoding = Decoding(size, device)
    depth = size.model["num_hidden_layers"]
    forms: dict[str, dict[str, Any]] = {
        "all layers above attend": {},
        "one layer attends": {"retrieval_layer": depth // 2 - 1, "attention_layers": (depth - 1,)},
    }
    for name, client in clients.items():
        decoding.fill(client, decoding.config(_memory(name)))
    for form, changes in forms.items():
        configs = {name: decoding.config(_memory(name), **changes) for name in clients}
        seconds, read = _in_turn(decoding, clients, configs, size.rounds)
        _add(f"{size}, {form}", seconds, read, report)
    for name, client in clients.items():
        client.drop_memory(_memory(name))


def _memory(name: str) -> str:
    return name.replace(" ", "-")


def _in_turn(
    decoding: Decoding, clients: dict[str, MemoryClient], configs: dict[str, MemoryConfig], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a token without memory and with each, and the share of forwards that had their rows."""
    times: dict[str, list[float]] = {name: [] for name in (BARE, *clients)}
    forwards: dict[str, list[int]] = {name: [0, 0] for name in clients}
    for number in range(rounds + 1):  # the first one warms up
        for name, seconds in times.items():
            held: AbstractContextManager[AttachedMemory | None] = nullcontext()
            if name != BARE:
                held = attach(decoding.model, clients[name], configs[name], sequences=decoding.names)
            with held as memory:
                taken = decoding.seconds_a_token()
            if number:
                seconds.append(taken)
                if memory is not None:
                    forwards[name][0] += memory.stats.steps_with_memory
                    forwards[name][1] += memory.stats.steps_without_memory
    shares = {name: with_rows / max(with_rows + without, 1) for name, (with_rows, without) in forwards.items()}
    return {name: statistics.median(values) for name, values in times.items()}, shares


def _add(case: str, seconds: dict[str, float], read: dict[str, float], report: Report) -> None:
    report.add(case, f"step, {BARE}", seconds[BARE] * 1e3, "ms")
    for name, share in read.items():
        report.add(case, f"step, {name}", seconds[name] * 1e3, "ms")
        report.add(case, f"forwards with their rows, {name}", share, "ratio", better="higher")
        ratio = seconds[BARE] / seconds[name]
        report.add(case, f"tokens/s / {BARE}, {name}", ratio, "ratio", goal=LEAST_SHARE, better="higher")


def main() -> None:
    """Measures the billion on a GPU where there is one, else the toy on the host, whose figures say nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the toy, and nothing is written")
    options = parser.parse_args()
    is_large = torch.cuda.is_available() and not options.quick
    report, device = Report("gpu-decode"), torch.device("cuda" if is_large else "cpu")
    with (
        running_server() as target,
        MemoryClient(timeout_s=TIMEOUT_S, device=device.type) as local,
        MemoryClient(target, timeout_s=TIMEOUT_S) as remote,
    ):
        measure(BILLION if is_large else TOY, device, {"in process": local, "server": remote}, report)
    if is_large:
        print(report.write())


if __name__ == "__main__":
    main()
