"""What does a step cost on each plane, against the same step in process? And what do distinct rows save on real text?

The server is a process of its own on this host, on the first GPU if there is one. All clients have memories of the same
rows and are asked in turn. On the plane `shm` or `cuda` the memory is mapped and the step is done in this process; on
`inline` it travels. The plane alone is measured with a search that gives a reply of 128 KiB at once. Bytes on the wire
are the same on every device, and are counted where the demo's model and transformers are there: for what models ask.

On a GPU steps follow one another, a stretch of each client: one that has nothing to do for 30 ms turns its clocks down,
and then takes any time between one and three times as long. So steps that far apart are measured too, without a goal,
and with them an echo by gRPC alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch

from benchmarks.report import Report, in_rounds, interleaved
from benchmarks.transport import BARE, STREAM, bare_callers
from integration.adapter import load_adapter
from integration.demo.server import running_server
from integration.demo.text import READ_PACKAGES, standard_library
from memstore.index.exact import ExactIndex
from memstore.types import Hits
from model_client import MemoryClient, Retrieval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from model_client import StepResult

DIM = 256
RETRIEVAL = Retrieval(16, after=1)
IN_PROCESS, INLINE, UNARY = "in process", "inline, stream", "inline, unary"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAPPED = "cuda" if DEVICE.type == "cuda" else "shm"
CASES = {"cpu": ((8, 16_384, 1), (8, 16_384, 512)), "cuda": ((32, 65_536, 1), (8, 65_536, 512))}
"""Sequences, live rows of each, rows of each in a step."""
REPLY_BYTES = 128 << 10
STRETCH = 11
"""Steps that one client does in a row on a GPU; the first is not counted."""
TEXT_ROWS = 4096
CONTEXT = 512
"""Tokens that the demo's model reads at once."""
SEGMENTS = (512, 1024)
"""Tokens of one step."""
AS_A_MODEL_ASKS = Retrieval(16, after=1, scores=False)
BASE = Path(__file__).resolve().parents[1] / "integration" / "demo" / "weights" / "base"


class Model:
    """A client's full memory, and a step on it with rows that it has not seen."""

    def __init__(self, client: MemoryClient, memory: str, case: tuple[int, int, int]) -> None:
        num_sequences, capacity, num_rows = case
        client.create_memory(memory, dim=DIM, capacity=capacity, max_sequences=num_sequences)
        self._session = client.session(memory, [f"sequence {index}" for index in range(num_sequences)])
        self._counts = [num_rows] * num_sequences
        self._generator = torch.Generator(DEVICE).manual_seed(1)
        for _ in range(capacity // 2048):
            self._session.append(self._states(2048), [2048] * num_sequences)
        self._keys = [self._states(num_rows) for _ in range(4)]

    @property
    def plane(self) -> str:
        """How its tensors travel."""
        return self._session.plane

    def step(self) -> StepResult:
        """Retrieves for a few rows, then appends them; the device is done afterwards."""
        keys = self._keys[0]
        self._keys.append(self._keys.pop(0))
        result = self._session.step(keys, self._counts, retrieve=RETRIEVAL, append=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    def _states(self, num_rows: int) -> torch.Tensor:
        shape = (len(self._counts) * num_rows, DIM)
        return torch.randn(shape, generator=self._generator, device=DEVICE, dtype=torch.float32).half()


def measure(clients: dict[str, MemoryClient], case: tuple[int, int, int], rounds: int, report: Report) -> None:
    """Adds the rows of one case."""
    num_sequences, capacity, num_rows = case
    models = {name: Model(client, _memory(name), case) for name, client in clients.items()}
    assert models[MAPPED].plane == MAPPED
    assert models[INLINE].plane == "inline"
    steps = {name: model.step for name, model in models.items()}
    kind = "decode" if num_rows == 1 else f"prefill of {num_rows}"
    name = f"{num_sequences} x {capacity} x {DIM}, {kind}"
    if DEVICE.type == "cpu":
        add_times(name, interleaved(steps, rounds), report, is_decode=num_rows == 1)
    else:
        add_times(name, stretches(steps, rounds), report, is_decode=num_rows == 1)
        add_times(f"{name}, 30 ms apart", interleaved(steps, 2 * rounds), report, has_goals=False)
    for label, client in clients.items():
        client.drop_memory(_memory(label))


def stretches(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, each called for a stretch once a round, but for the first call of a stretch."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            for _ in range(STRETCH - 1):
                begun = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def add_times(
    name: str, seconds: dict[str, float], report: Report, *, is_decode: bool = False, has_goals: bool = True
) -> None:
    """Adds what a step takes on each plane, and against one in process."""
    for label, value in seconds.items():
        report.add(name, label, value * 1e3, "ms")
    base = seconds[IN_PROCESS]
    is_host = DEVICE.type == "cpu"
    is_meant = has_goals and (is_decode or not is_host)
    report.add(name, f"{MAPPED} / in process", seconds[MAPPED] / base, "ratio", goal=1.05 if is_meant else None)
    most, most_ms = (1.15, None) if is_host else (None, 0.8)
    report.add(name, f"{INLINE} / in process", seconds[INLINE] / base, "ratio", goal=most if is_decode else None)
    more_ms = (seconds[INLINE] - base) * 1e3
    report.add(name, f"{INLINE} - in process", more_ms, "ms", goal=most_ms if is_decode else None)


def measure_echo(rounds: int, report: Report) -> None:
    """Adds what gRPC alone takes there and back, which a step inline cannot undercut."""
    with bare_callers() as callers:
        echo = {STREAM: callers[BARE, STREAM].seconds}
        report.add(BARE, STREAM, stretches(echo, rounds)[STREAM] * 1e3, "ms")
        report.add(f"{BARE}, 30 ms apart", STREAM, interleaved(echo, rounds)[STREAM] * 1e3, "ms")


def _memory(label: str) -> str:
    """The name of the memory of one client."""
    return label.replace(", ", "-").replace(" ", "-")


@contextmanager
def no_search() -> Iterator[None]:
    """Every retrieval in this process finds the same rows, REPLY_BYTES of them, at once."""
    num_rows = REPLY_BYTES // (DIM * 2)
    found = Hits(
        row_splits=torch.tensor([0, *[num_rows] * 8]),
        positions=torch.arange(num_rows),
        index=torch.zeros(1, 8, RETRIEVAL.top_k, 2, dtype=torch.int32),
        scores=torch.zeros(1, 8, RETRIEVAL.top_k),
        arrays={"key": torch.zeros(num_rows, DIM, dtype=torch.float16)},
    )
    with mock.patch.object(ExactIndex, "retrieve", lambda *_: found):
        yield


def measure_plane(clients: dict[str, MemoryClient], rounds: int, report: Report) -> None:
    """Adds what the plane itself costs: everything of a step but the search."""
    here = {name: clients[name] for name in (IN_PROCESS, MAPPED)}
    models = {name: Model(client, "alone", (8, 4096, 1)) for name, client in here.items()}
    with no_search():
        seconds = in_rounds({name: model.step for name, model in models.items()}, rounds)
    name = f"no search, reply of {REPLY_BYTES >> 10} KiB"
    for label, values in seconds.items():
        report.add(name, label, statistics.median(values) * 1e3, "ms")
    more = [mapped - here for mapped, here in zip(seconds[MAPPED], seconds[IN_PROCESS], strict=True)]
    report.add(name, f"{MAPPED} - in process", statistics.median(more) * 1e3, "ms", goal=0.1)
    for client in here.values():
        client.drop_memory("alone")


def text_states(num_sequences: int, num_rows: int) -> torch.Tensor:
    """(sequences, rows, dim) float16: what the demo's model keeps of source text that it was not trained on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = load_adapter(BASE.with_name("adapter"), device=DEVICE, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = adapter.apply_lora(base).to(DEVICE).eval()
    text = standard_library(READ_PACKAGES).text[: 4 * num_sequences * num_rows]
    tokens = AutoTokenizer.from_pretrained(BASE)(text, return_tensors="pt").input_ids[0].to(DEVICE)
    segments = tokens[: num_sequences * num_rows].reshape(-1, CONTEXT)
    with torch.no_grad():
        outputs = [model(segment[None], output_hidden_states=True) for segment in segments]
        hidden = torch.cat([output.hidden_states[adapter.config.retrieval_layer][0] for output in outputs])
        return adapter.weights.projection(hidden).reshape(num_sequences, num_rows, -1).half()


def measure_text(client: MemoryClient, report: Report) -> None:
    """Adds how many bytes the rows of all windows would have, against those of the replies."""
    num_sequences = 4
    states = text_states(num_sequences, TEXT_ROWS)
    dim = states.shape[2]
    for length in SEGMENTS:
        client.create_memory("text", dim=dim, capacity=TEXT_ROWS, max_sequences=num_sequences)
        session = client.session("text", [f"text {index}" for index in range(num_sequences)])
        received = asked = 0.0
        for begin in range(0, TEXT_ROWS, length):
            keys = states[:, begin : begin + length].reshape(1, -1, dim)
            before = client.stats.received_bytes
            session.step(keys, [length] * num_sequences, retrieve=AS_A_MODEL_ASKS, append=True)
            received += client.stats.received_bytes - before
            if begin:
                asked += num_sequences * length * AS_A_MODEL_ASKS.top_k * 2 * dim * 2
        client.drop_memory("text")
        name = f"{num_sequences} x {TEXT_ROWS} x {dim}, source text, segments of {length}"
        report.add(name, "replies", received / 2**20, "MiB")
        report.add(name, "rows of every window", asked / 2**20, "MiB")
        report.add(name, "rows of every window / replies", asked / received, "ratio", goal=10.0, better="higher")


def main() -> None:
    """Measures all cases, or with --quick each in few rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds, on a GPU a third")
    is_quick, is_host = parser.parse_args().quick, DEVICE.type == "cpu"
    rounds = (10 if is_quick else 100) if is_host else (10 if is_quick else 30)
    report = Report("planes" if is_host else "gpu-planes")
    with (
        running_server() as target,
        MemoryClient(timeout_s=60.0, device=DEVICE.type) as local,
        MemoryClient(target, timeout_s=60.0, plane=MAPPED) as mapped,
        MemoryClient(target, timeout_s=60.0, plane="inline") as stream,
        MemoryClient(target, timeout_s=60.0, plane="inline", use_stream=False) as unary,
    ):
        clients = {IN_PROCESS: local, MAPPED: mapped, INLINE: stream}
        if is_host:
            clients[UNARY] = unary
        for case in CASES[DEVICE.type]:
            measure(clients, case, rounds if case[2] == 1 else max(rounds // 10, 3), report)
        if is_host:
            measure_plane(clients, rounds, report)
        else:
            measure_echo(rounds, report)
        if BASE.exists() and importlib.util.find_spec("transformers") is not None:
            measure_text(stream, report)
    print(report.write())


if __name__ == "__main__":
    main()
