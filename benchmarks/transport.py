"""What does a step cost through gRPC, unary and on a stream, against the same step in process? What is it without the
search, and what of that is gRPC's own? And what do distinct rows save?

The server is a process of its own on a loopback port; the three memories hold the same rows and are asked in turn. A
reply has each distinct row once: its bytes on the wire are set against those of `top_k * window` rows a query, which a
reply without that would have. Rows drift as the states of a text do, or have nothing to do with each other: then few
rows of a reply are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from benchmarks.bare import BareStream, BareUnary
from benchmarks.canned import canned
from benchmarks.report import Report, interleaved
from model_client import MemoryClient, Retrieval

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from model_client import StepResult

DIM = 256
RETRIEVAL = Retrieval(16, after=1)
IN_PROCESS, UNARY, STREAM = "in process", "gRPC, unary", "gRPC, stream"
START_S = 120.0
STRETCH = 21
"""Steps without a search that one client does in a row; the first is not counted."""
DRIFT = 0.2
"""Share of a new direction in each row, beside the row before it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One size: sequences of `capacity` live float16 rows, with `num_queries` rows each in a step."""

    num_sequences: int
    capacity: int
    num_queries: int
    is_drifting: bool = True

    def __str__(self) -> str:
        kind = "decode" if self.num_queries == 1 else f"prefill of {self.num_queries}"
        rows = "" if self.is_drifting else ", unrelated rows"
        return f"{self.num_sequences} x {self.capacity} x {DIM}, {kind}{rows}"

    @property
    def asked_bytes(self) -> int:
        """Bytes of the rows of a reply that gives every hit's window for itself."""
        window = RETRIEVAL.before + 1 + RETRIEVAL.after
        return self.num_sequences * self.num_queries * RETRIEVAL.top_k * window * DIM * 2


CASES = (
    Case(8, 4096, 1),
    Case(8, 16384, 1),
    Case(4, 4096, 512),
    Case(4, 16384, 512),
    Case(4, 4096, 512, is_drifting=False),
)


ALONE = {"without the search, 128 KiB reply": Case(8, 16, 1), "without the search, 33.5 MB reply": Case(4, 16, 512)}
PLANE_GOALS_MS = {UNARY: 1.0, STREAM: 0.7}
LARGE_GOAL_GB_PER_S = 0.6
LARGE_GOAL_FAULTS = 500


BARE = "bare gRPC echo, 128 KiB"


class Timed(Protocol):
    """What can be done again and again."""

    def seconds(self) -> float:
        """How long it takes once."""


class States:
    """What the sequences of a case go on to hold, the same for every client."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._generator = torch.Generator().manual_seed(1)
        self._last = torch.zeros(case.num_sequences, DIM)

    def take(self, num_rows: int) -> torch.Tensor:
        """(1, sequences * num_rows, DIM) float16: the next rows of every sequence."""
        states = torch.randn(self._case.num_sequences, num_rows, DIM, generator=self._generator)
        if self._case.is_drifting:
            for index in range(num_rows):
                states[:, index] = self._last = (1 - DRIFT) * self._last + DRIFT * states[:, index]
        return states.reshape(1, -1, DIM).half()


class Model:
    """A client's full memory, and a step on it with rows that it has not seen."""

    def __init__(self, client: MemoryClient, case: Case, rounds: int) -> None:
        names = [f"sequence {index}" for index in range(case.num_sequences)]
        client.create_memory(client.transport, dim=DIM, capacity=case.capacity, max_sequences=case.num_sequences)
        self._session = client.session(client.transport, names)
        self._counts = [case.num_queries] * case.num_sequences
        states = States(case)
        for _ in range(case.capacity // 2048):
            self._session.append(states.take(2048), [2048] * case.num_sequences)
        self._steps = iter([states.take(case.num_queries) for _ in range(rounds)])

    def step(self) -> StepResult:
        """The next step: retrieves for the new rows, and appends them."""
        return self._session.step(next(self._steps), self._counts, retrieve=RETRIEVAL, append=True)


def measure(case: Case, clients: dict[str, MemoryClient], report: Report, rounds: int) -> None:
    """Adds the rows of one case."""
    models = {name: Model(client, case, rounds + 2) for name, client in clients.items()}
    seconds = interleaved({name: model.step for name, model in models.items()}, rounds)
    reply_bytes, sent_bytes, distinct = traffic(clients[STREAM], models[STREAM])
    for name, value in seconds.items():
        report.add(str(case), name, value * 1e3, "ms")
    for name in (UNARY, STREAM):
        report.add(str(case), f"{name} - in process", (seconds[name] - seconds[IN_PROCESS]) * 1e3, "ms")
        report.add(str(case), f"{name} / in process", seconds[name] / seconds[IN_PROCESS], "ratio")
    allowed = 1.05 * seconds[IN_PROCESS] + 0.6e-3 + 1.5e-3 * (reply_bytes + sent_bytes) / 2**20
    report.add(
        str(case), "stream / (1.05 in process + 0.6 ms + 1.5 ms/MiB)", seconds[STREAM] / allowed, "ratio", goal=1.0
    )
    report.add(str(case), "reply", reply_bytes / 2**20, "MiB")
    report.add(str(case), "rows of every window", case.asked_bytes / 2**20, "MiB")
    report.add(str(case), "rows of every window / reply", case.asked_bytes / reply_bytes, "ratio", better="higher")
    report.add(str(case), "distinct rows", distinct, "rows")
    for client in clients.values():
        client.drop_memory(client.transport)


def traffic(client: MemoryClient, model: Model) -> tuple[float, float, int]:
    """Bytes of a reply and of a request, and the distinct rows of the reply."""
    before = client.stats.as_dict()
    hits = model.step().hits
    after = client.stats.as_dict()
    assert hits is not None
    return (
        after["received_bytes"] - before["received_bytes"],
        after["sent_bytes"] - before["sent_bytes"],
        len(hits.positions),
    )


def measure_small(case: str, size: Case, clients: dict[str, MemoryClient], report: Report, rounds: int) -> None:
    """Adds the time of a step without its search, and with a small reply; and of gRPC alone, with the same sizes."""
    with bare_callers() as callers:
        steps: dict[tuple[str, str], Timed] = {(case, name): Canned(each, size) for name, each in clients.items()}
        steps |= callers
        seconds: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, each in steps.items():  # a stretch each: the steps of a decode loop follow one another
                seconds[name] += [each.seconds() for _ in range(STRETCH)][1:]
    for (of, name), values in seconds.items():
        goal = PLANE_GOALS_MS.get(name) if of == case else None
        report.add(of, name, statistics.median(values) * 1e3, "ms", goal=goal)


@contextmanager
def bare_callers() -> Iterator[dict[tuple[str, str], Timed]]:
    """Callers of a server that does nothing but answer, by case and figure."""
    with (
        server("benchmarks.bare") as (target, _),
        closing(BareUnary(target)) as unary,
        closing(BareStream(target)) as stream,
    ):
        yield {(BARE, UNARY): unary, (BARE, STREAM): stream}


def measure_large(
    case: str, size: Case, clients: dict[str, MemoryClient], processes: Sequence[int], report: Report, rounds: int
) -> None:
    """Adds the speed of a step without its search, and with a large reply, and its page faults."""
    for name, client in clients.items():
        canned_step = Canned(client, size)
        received = client.stats.received_bytes
        canned_step.seconds(), canned_step.seconds()
        num_bytes = (client.stats.received_bytes - received) / 2 or size.asked_bytes
        before = page_faults(processes)
        seconds = [canned_step.seconds() for _ in range(rounds)]
        faults = (page_faults(processes) - before) / rounds
        is_goal = name == STREAM
        speed = num_bytes / statistics.median(seconds) / 1e9
        report.add(case, name, speed, "GB/s", goal=LARGE_GOAL_GB_PER_S if is_goal else None, better="higher")
        report.add(case, f"{name}, page faults", faults, "", goal=LARGE_GOAL_FAULTS if is_goal else None)


class Canned:
    """Steps of a client whose search finds what is made beforehand."""

    def __init__(self, client: MemoryClient, size: Case) -> None:
        names = [f"sequence {index}" for index in range(size.num_sequences)]
        memory = f"{client.transport} {size.num_queries}".replace(" ", "-")
        with canned():
            client.create_memory(memory, dim=DIM, capacity=size.capacity, max_sequences=size.num_sequences)
        self._session = client.session(memory, names)
        self._counts = [size.num_queries] * size.num_sequences
        self._keys = States(size).take(size.num_queries)

    def seconds(self) -> float:
        """How long one step takes."""
        begun = time.perf_counter()
        self._session.step(self._keys, self._counts, retrieve=RETRIEVAL, append=True)
        return time.perf_counter() - begun


def page_faults(processes: Sequence[int]) -> int:
    """Page faults without reading from a disk, of these processes and of this one, since they began."""
    others = (Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split() for number in processes)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt + sum(int(fields[7]) for fields in others)


@contextmanager
def server(*module: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own; gives its address and the process. module: what is run, with its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        command = [sys.executable, "-m", *module, "--port", "0", "--metrics-port", "-1", "--catalog", "none"]
        command += ["--device", "cpu", "--log-level", "warning", "--ready-file", str(ready)]
        with subprocess.Popen(command, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}) as process:
            try:
                yield address(process, ready), process.pid
            finally:
                process.terminate()


def address(process: subprocess.Popen[bytes], ready: Path) -> str:
    """Where the server listens, once it does."""
    for _ in range(round(START_S / 0.1)):
        if ready.exists():
            return str(json.loads(ready.read_text())["address"])
        try:
            process.wait(0.1)
            break
        except subprocess.TimeoutExpired:
            continue
    raise RuntimeError("the server did not start")


def main() -> None:
    """Measures all cases, or with --quick each in few rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    rounds = 10 if parser.parse_args().quick else 100
    report = Report("transport")
    with three_clients("memstore", "serve") as (clients, _):
        for case in CASES:
            measure(case, clients, report, rounds if case.num_queries == 1 else max(rounds // 10, 3))
    with three_clients("benchmarks.canned") as (clients, process):
        small, large = ALONE.items()
        measure_small(*small, clients, report, rounds // 2)
        measure_large(*large, clients, [process], report, max(rounds // 4, 5))
    print(report.write())


@contextmanager
def three_clients(*module: str) -> Iterator[tuple[dict[str, MemoryClient], int]]:
    """Clients by their way to a server; and the process of the one of its own."""
    with (
        server(*module) as (target, process),
        MemoryClient(timeout_s=60.0, device="cpu") as local,
        MemoryClient(target, timeout_s=60.0, use_stream=False, plane="inline") as unary,
        MemoryClient(target, timeout_s=60.0, plane="inline") as stream,
    ):
        yield {IN_PROCESS: local, UNARY: unary, STREAM: stream}, process


if __name__ == "__main__":
    main()
