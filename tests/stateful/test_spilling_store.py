"""A memory with fewer places than sequences, behind a server that is killed and started again, against the oracle."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from memstore.errors import MemstoreError
from memstore.types import Durability, IndexKind, MemorySpec, SequencePart, SpillSpec
from model_client import Retrieval, errors
from tests.stateful.test_durable_store import DurableStore, Lives
from tests.stateful.test_store import SEEDS, SOME, SPECS

TTL_S = 100
SPILLS = [SpillSpec(max_sequences=most, host_sequences=host) for most in (1, 2) for host in range(most + 1)]
SPILLING_SPECS = st.builds(
    lambda spec, index, durability, places, spill: dataclasses.replace(
        spec, index=index, durability=durability, max_sequences=places, spill=spill, idle_ttl_s=TTL_S
    ),
    SPECS,
    st.sampled_from([IndexKind.EXACT, IndexKind.FAISS_FLAT]),
    st.sampled_from([Durability.ALWAYS, Durability.INTERVAL, Durability.VOLATILE]),
    st.sampled_from([2, 2, 3]),
    st.sampled_from(SPILLS),
)


class SpillingStore(DurableStore):
    """What DurableStore does, where sequences come and go, are pinned, and end when nobody uses them."""

    num_spills = num_returns = num_files = num_expired = 0

    @initialize(spec=SPILLING_SPECS, seed=SEEDS)
    def begin(self, spec: MemorySpec, seed: int) -> None:
        """A new memory, and nobody has written."""
        super().begin(spec=spec, seed=seed)

    def teardown(self) -> None:
        """The memory is dropped, and nothing of it is left but what says who is here."""
        if hasattr(self, "client"):
            self.count()
        super().teardown()
        assert not [path for path in self.lives.disk.files if "spilled" in path.parts]

    @invariant()
    def what_is_pinned_is_on_the_device(self) -> None:
        """And every place in host memory that nothing lies in is free."""
        if not hasattr(self, "reference"):
            return
        (loaded,) = self.server.registry.all()
        table, spill = loaded.engine._table, loaded.engine.lifecycle.spill
        assert all(table[name].place < self.spec.max_sequences for name in self.reference.pinned)
        assert spill is not None
        assert spill.tiers.has_room
        type(self).num_files += spill.counts().num_on_disk

    @rule(names=st.sampled_from(["a", "a", "b", "c", "ab"]), unpin=st.sampled_from([False, False, True]))
    def pin(self, names: str, unpin: bool) -> None:
        """Sequences are to stay, or may leave again."""
        try:
            got = self.client.pin("m", list(names), unpin=unpin)
        except errors.MemstoreClientError as error:
            with pytest.raises(MemstoreError) as raised:
                self.reference.pin(list(names), unpin)
            assert type(raised.value).__name__ == type(error).__name__
        else:
            assert got == self.reference.pin(list(names), unpin)

    @rule(used=SOME)
    def time_passes(self, used: str) -> None:
        """Nobody uses anything for too long, but for one sequence."""
        self.lives.clock.advance(TTL_S)
        retrieval = Retrieval(1)
        batch = self.batch((SequencePart(sequence=used, num_rows=1),), retrieval, False)
        is_used = True
        try:
            self.call(self.request(batch, retrieval))
            self.reference.step(batch)
        except errors.QuotaExceeded:
            is_used = False
        registry = self.server.registry
        (loaded,) = registry.all()
        ends = [name for name in self.reference.sequences if name not in self.reference.pinned]
        ends = [name for name in ends if not (is_used and name == used)]
        num_expired = registry.worker.control(loaded.engine.expire).result()
        assert num_expired == len(ends)
        type(self).num_expired += num_expired
        self.reference.reset(ends, release=True)

    @rule()
    def snapshot(self) -> None:
        """A snapshot is taken, of what lasts."""
        if self.spec.durability is not Durability.VOLATILE:
            super().snapshot()

    @rule(is_killed=st.booleans())
    def restart(self, is_killed: bool) -> None:
        """The server is killed, or stopped, and comes back; a volatile memory stays."""
        if self.spec.durability is not Durability.VOLATILE:
            self.count()
            super().restart(is_killed=is_killed)

    def count(self) -> None:
        """Adds what this life has seen to what all have."""
        spill = self.client.describe_memory("m").status.spill
        type(self).num_spills += spill.spills
        type(self).num_returns += spill.returns


EVENTFUL = dataclasses.replace(
    MemorySpec(name="m", dim=2, capacity=4, max_sequences=2),
    durability=Durability.ALWAYS,
    spill=SpillSpec(max_sequences=2, host_sequences=1),
    idle_ttl_s=TTL_S,
)


def live_an_eventful_life(machine: type[SpillingStore]) -> None:
    """One in which sequences leave for host memory and a file, return and end: none of it is left to chance."""
    life = machine()
    life.begin(spec=EVENTFUL, seed=0)
    for names in ("a", "b", "c", "d", "a", "d", "b"):
        life.step_of_a_session(counts=dict.fromkeys(names, 2), retrieval=Retrieval(2), who=0, starts="")
        life.what_is_pinned_is_on_the_device()
    life.restart(is_killed=True)
    life.step_of_a_session(counts={"c": 1}, retrieval=Retrieval(2), who=1, starts="")
    life.time_passes(used="c")
    life.counters_agree()
    life.teardown()


@pytest.mark.timeout(300)
def test_a_store_that_spills_does_what_the_oracle_does() -> None:
    lives = Lives()
    machine = type("SpillingStoreOfThisServer", (SpillingStore,), {"lives": lives, "server": lives.server})
    try:
        live_an_eventful_life(machine)
        assert min(machine.num_spills, machine.num_returns, machine.num_files, machine.num_expired) > 0
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
            ),
        )
    finally:
        lives.stop()
