"""A memory with generations against the oracle: builds lag, fail and are overtaken while all else goes on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from memstore.types import Metric
from tests.building import KINDS, Pair, spec_of

pytest.importorskip("faiss")
NAMES = st.sampled_from("aaab")


class Generations(RuleBasedStateMachine):
    """Three sequences at most, two layers, generations of 32 rows, rings of one to four of them."""

    @initialize(
        kind=st.sampled_from(KINDS),
        metric=st.sampled_from(Metric),
        capacity=st.integers(33, 128),
        seed=st.integers(0, 2**31),
    )
    def begin(self, kind: object, metric: Metric, capacity: int, seed: int) -> None:
        """An empty memory."""
        torch.manual_seed(seed)
        spec = dataclasses.replace(spec_of(kind), metric=metric, capacity=capacity)  # type: ignore[arg-type]
        self.pair = Pair(spec, torch.device("cpu"))

    @rule(name=NAMES, num_rows=st.integers(1, 70), start=st.integers(0, 9).map(lambda number: number == 0))
    def append(self, name: str, num_rows: int, start: bool) -> None:
        """A step, now and then of a sequence that begins anew."""
        self.pair.append(name, num_rows, start=start)

    @rule(share=st.none() | st.floats(0, 1), top_k=st.sampled_from([4, 20, 200]))
    def look(self, share: float | None, top_k: int) -> None:
        """All of a sequence, or a prefix."""
        sequence = self.pair.reference.sequences.get("a")
        as_of = None if share is None or sequence is None else round(len(sequence.rows) * share)
        self.pair.look("a", as_of=as_of, top_k=top_k)

    @rule(number=st.integers(1, 3))
    def build(self, number: int) -> None:
        """The build thread gets some time."""
        self.pair.builds.run(number)

    @precondition(lambda self: len(self.pair.builds) > 0)
    @rule()
    def fail(self) -> None:
        """The next build finds no memory."""
        builder = self.pair.memory._index._builder  # type: ignore[attr-defined]
        real, builder._centres = builder._centres, _no_room
        graph, builder._graph = builder._graph, _no_room
        self.pair.builds.run(1)
        builder._centres, builder._graph = real, graph

    @rule(release=st.booleans(), name=st.sampled_from("abc"))
    def reset(self, release: bool, name: str) -> None:
        """A sequence is emptied or given back."""
        self.pair.reset([name], release)

    @rule(share=st.none() | st.floats(0, 1))
    def fork(self, share: float | None) -> None:
        """A sequence gets the prefix of another one; its place had another one's rows, perhaps."""
        source = self.pair.reference.sequences.get("a")
        assume(source is not None)
        if "c" in self.pair.reference.sequences:
            self.pair.reset(["c"], release=True)
        assert source is not None
        self.pair.fork("a", "c", None if share is None else round(len(source.rows) * share))
        self.pair.look("a", "c")

    def teardown(self) -> None:
        """Whatever was left is built, and changes nothing."""
        if hasattr(self, "pair"):
            self.pair.builds.run()
            self.pair.look("a", "b", "c")
            self.pair.memory.free()
            self.pair.memory.join()


def _no_room(*_: object) -> None:
    raise MemoryError("no room")


@pytest.mark.timeout(180)
def test_generations_do_what_the_oracle_does() -> None:
    run_state_machine_as_test(
        Generations,
        settings=settings(
            max_examples=40, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
