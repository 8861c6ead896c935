"""What is thrown at a server and its decoders, and what comes of it: parts of `benchmarks.reliability`.

seeded      every bug of tests/seeded is planted, and the tests that should notice are run
abuse       raw sockets misuse each port of a server, whose memory, threads and descriptors are watched
mutations   every decoder is given what it takes, changed at random
simulation  a durable memory over a disk that fails and a process that ends at any point, one seed a run
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from tests.fuzz.targets import TARGETS
from tests.processes import Usage
from tests.security import attacks
from tests.security.victim import KEPT_BYTES, RISE_BYTES, SPARE, Victim
from tests.sim.test_durable_memory import Simulation

if TYPE_CHECKING:
    from benchmarks.report import Report

CALLS = 60
"""Of one run of the simulation."""


def seeded(report: Report, is_quick: bool) -> None:
    """Bugs that are planted on purpose."""
    command = [sys.executable, "-m", "tests.seeded.seeding", *(["--quick"] if is_quick else [])]
    words = subprocess.run(
        command, stdout=subprocess.PIPE, text=True
    ).stdout  # its forks want a process without threads
    told = re.search(r"^(\d+) of (\d+) caught$", words, re.MULTILINE)
    if told is None:
        raise SystemExit(words)
    print(words)
    caught, planted = map(int, told.groups())
    report.add("seeded bugs", "planted", planted, "count", better="higher")
    report.add("seeded bugs", "not caught", planted - caught, "count", goal=0)


def abuse(report: Report, number: int) -> None:
    """Each port in turn, and what the server has of its machine meanwhile and afterwards."""
    with tempfile.TemporaryDirectory(prefix="memstore-") as folder:
        victim = Victim(Path(folder))
        try:
            ports = {"calls": victim.front, "metrics": victim.metrics, "descriptors": victim.sockets}
            kinds = {"calls": attacks.GRPC, "metrics": attacks.HTTP, "descriptors": attacks.PACKETS}
            rss = []
            for port, target in ports.items():
                rss += [victim.endure(attack, target, number).rss_bytes for attack in kinds[port]]
                report.add("abuse of raw sockets", f"{port}: sent", target.num_sent / 1e6, "MB", better="higher")
            after = Usage.of(victim.pid)
            rise = max(rss) - victim.before.rss_bytes
            kept = max(after.rss_bytes - victim.before.rss_bytes, 0)
            threads = max(after.num_threads - victim.before.num_threads, 0)
            descriptors = max(after.num_descriptors - victim.before.num_descriptors, 0)
        finally:
            victim.close()
    report.add("abuse of raw sockets", "kinds of attack", sum(map(len, kinds.values())), "count", better="higher")
    report.add("abuse of raw sockets", "rise of memory at most", rise / 1e6, "MB", goal=RISE_BYTES / 1e6)
    report.add("abuse of raw sockets", "memory left behind", kept / 1e6, "MB", goal=KEPT_BYTES / 1e6)
    report.add("abuse of raw sockets", "threads left behind", threads, "count", goal=SPARE)
    report.add("abuse of raw sockets", "descriptors left behind", descriptors, "count", goal=SPARE)


def mutations(report: Report, rounds: int) -> None:
    """Inputs that a decoder had no answer to."""
    tried = unanswered = 0
    for name, make in TARGETS.items():
        with tempfile.TemporaryDirectory(prefix="memstore-") as folder:
            target, random = make(Path(folder)), Random(name)
            for _ in range(rounds):
                content = target.mutate(random.choice(target.seeds), random)
                tried += 1
                try:
                    target.run(content)
                except Exception as error:
                    unanswered += 1
                    print(f"{name}: {error!r}: {content[:500].hex()}")
    report.add("mutated input", "decoders", len(TARGETS), "count", better="higher")
    report.add("mutated input", "tried", tried, "count", better="higher")
    report.add("mutated input", "neither taken nor refused", unanswered, "count", goal=0)


def simulation(report: Report, seeds: int) -> None:
    """Runs in which an answer was taken back, or an intact memory taken for damaged."""
    failed = 0
    for seed in range(1_000_000, 1_000_000 + seeds):  # beside those of the tests
        try:
            Simulation(seed).run(CALLS)
        except Exception as error:
            failed += 1
            print(f"seed {seed}: {error!r}")
    report.add("simulated disk, process and power", "seeds", seeds, "count", better="higher")
    report.add("simulated disk, process and power", "calls", seeds * CALLS, "count", better="higher")
    report.add("simulated disk, process and power", "seeds with an answer taken back", failed, "count", goal=0)
