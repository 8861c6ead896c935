"""Whatever the network does: each row once at most, in order, and what was promised is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memstore.embedded import Embedded
from model_client import errors
from tests.faulty import DEADLINE_S, EVERYTHING, Bench, Fault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model_client import PendingStep


@pytest.fixture(scope="module")
def server() -> Iterator[Embedded]:
    embedded = Embedded("cpu", capacity_bytes=1 << 24)
    yield embedded
    embedded.close()


FAULTS = st.lists(st.sampled_from(Fault), max_size=3)
COUNTS = st.tuples(st.integers(0, 2), st.integers(0, 2))
OPERATIONS: st.SearchStrategy[list[Any]] = st.lists(
    st.one_of(
        st.tuples(st.just("append"), COUNTS, FAULTS),
        st.tuples(st.just("start"), COUNTS, FAULTS),
        st.tuples(st.just("await"), COUNTS, st.just([])),
        st.tuples(st.just("release"), COUNTS, st.just([])),
        st.tuples(st.sampled_from(["retrieve", "start one", "reset by another", "drop by another"]), COUNTS, FAULTS),
    ),
    max_size=14,
)


class Model:
    """What is known of each sequence: the rows that were promised to be in it, if nothing has emptied it since."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.promised: dict[str, list[int]] = {"a": [], "b": []}
        self.pending: list[tuple[dict[str, list[int]], PendingStep]] = []

    def begin(self, counts: tuple[int, int], starts: tuple[bool, bool]) -> None:
        """Begins a step, and leaves it."""
        numbers = {}
        rows = []
        for name, count, is_start in zip("ab", counts, starts, strict=True):
            numbers[name], keys = self.bench.rows(count)
            rows.append(keys)
            if is_start:
                self.forget(name)
        keys = torch.cat(rows)
        pending = self.bench.session.start_step(
            keys,
            counts,
            retrieve=EVERYTHING,
            append=True,
            payloads={"twice": (keys * 2).int()},
            start_of_sequence=starts,
        )
        self.pending.append((numbers, pending))

    def forget(self, name: str) -> None:
        """From now on the sequence may be empty: nothing that was begun before is promised any more."""
        self.promised[name].clear()
        for numbers, _ in self.pending:
            numbers[name] = []

    def wait(self, index: int) -> None:
        """Asks for the result of one step; what it says it has done is promised."""
        numbers, pending = self.pending.pop(index)
        if _ignore(pending):
            for name, rows in numbers.items():
                self.promised[name] += rows

    def run(self, kind: str, counts: tuple[int, int], faults: list[Fault]) -> None:
        """One operation."""
        network = self.bench.network
        network.script = list(faults)
        if kind in ("append", "start", "start one"):
            self.begin(counts, (kind != "append", kind == "start"))
        elif kind == "await" and self.pending:
            self.wait(sum(counts) % len(self.pending))
        elif kind == "release" and network.held:
            network.release(sum(counts) % len(network.held))
        elif kind == "retrieve":
            _ignore(self.bench.session.start_step(torch.zeros(1, 1), [1, 0], retrieve=EVERYTHING, append=False))
        elif kind.endswith("by another"):
            name = "ab"[counts[0] % 2]
            self.bench.clean.reset("m", [name], release=kind.startswith("drop"))
            self.forget(name)


@settings(max_examples=200, deadline=None)
@given(operations=OPERATIONS, timeout_s=st.sampled_from([DEADLINE_S, 0.2]))
def test_whatever_the_network_does(
    server: Embedded, operations: list[tuple[str, tuple[int, int], list[Fault]]], timeout_s: float
) -> None:
    model = Model(Bench(server, sequences=("a", "b"), timeout_s=timeout_s))
    bench = model.bench
    for kind, counts, faults in operations:
        model.run(kind, counts, faults)
    bench.network.script.clear()
    while model.pending:
        model.wait(0)
    for _ in range(2):
        model.begin((1, 1), (False, False))
        model.wait(0)
    contents = {name: bench.content(name) for name in "ab"}
    for name, content in contents.items():
        assert content == sorted(set(content)), "a row twice, or out of order"
        assert set(model.promised[name]) <= set(content), "a row that was promised is missing"
        assert model.promised[name], "the session does not go on"
    while bench.network.held:
        bench.network.release(len(bench.network.held) - 1)
    assert {name: bench.content(name) for name in "ab"} == contents, "a request that arrived too late was done"


def _ignore(pending: PendingStep) -> bool:
    try:
        pending.result()
    except errors.MemstoreClientError:
        return False
    return True
