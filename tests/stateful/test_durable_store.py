"""A durable memory behind a real gRPC server that is killed, stopped and started again, against the oracle."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from memstore.catalog import FileCatalog
from memstore.types import Durability
from tests.fakes import FakeClock, FakeDisk
from tests.serving import Serving, Setting, file_store, serving
from tests.stateful.test_store import SEEDS, SPECS, Store

if TYPE_CHECKING:
    from memstore.types import MemorySpec

DATA = Path("/data")
DURABLE_SPECS = st.builds(
    lambda spec, durability: replace(spec, durability=durability),
    SPECS,
    st.sampled_from([Durability.ALWAYS, Durability.INTERVAL]),
)


class Lives:
    """One server after another, on one port and one disk."""

    def __init__(self) -> None:
        self.disk = FakeDisk()
        self.clock = FakeClock()
        self._stack = ExitStack()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.server = self._start()

    def stop(self) -> None:
        """Stops in order."""
        self._stack.close()

    def restart(self, is_killed: bool) -> None:
        """Another life. A process that is killed leaves its files as they are."""
        left = dict(self.disk.files)
        self.stop()
        if is_killed:
            self.disk.files = left
        self.server = self._start()

    def _start(self) -> Serving:
        store = file_store(DATA, self.disk, self.clock)
        catalog = FileCatalog(DATA, self.disk)
        setting = Setting(catalog=catalog, store=store, port=self._port, clock=self.clock)
        return self._stack.enter_context(serving(setting))


class DurableStore(Store):
    """What Store does, on a server that does not live long."""

    lives: Lives

    @initialize(spec=DURABLE_SPECS, seed=SEEDS)
    def begin(self, spec: MemorySpec, seed: int) -> None:
        """A new memory, and nobody has written."""
        self.server = self.lives.server
        super().begin(spec=spec, seed=seed)

    @rule(is_killed=st.booleans())
    def restart(self, is_killed: bool) -> None:
        """The server is killed, or stopped, and comes back."""
        self.lives.restart(is_killed)
        self.server = self.lives.server

    @rule()
    def snapshot(self) -> None:
        """A snapshot is taken."""
        registry = self.lives.server.registry
        for loaded in registry.all():
            assert loaded.archive is not None
            assert loaded.archive.snapshot(loaded.engine, registry.worker.control)


@pytest.mark.timeout(300)
def test_a_store_that_is_restarted_does_what_the_oracle_does() -> None:
    lives = Lives()
    machine = type("DurableStoreOfThisServer", (DurableStore,), {"lives": lives, "server": lives.server})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
            ),
        )
    finally:
        lives.stop()
