"""Standing steps: what is asked again and again is found as by steps, beside the thread of the device."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from memstore.memory import Memory
from memstore.standing import Guests
from memstore.types import Durability, MemorySpec, RetrieveOptions, SequencePart, StepBatch
from model_client import MemoryClient, Retrieval, errors
from tests.leasing import client_of, create, rows, until
from tests.serving import Setting, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model_client import Session
    from model_client.standing import StandingStep

NAMES = ["a", "b"]
WANTED = Retrieval(3, before=1, after=1)


@pytest.fixture
def client() -> Iterator[MemoryClient]:
    """With a memory of this process."""
    with MemoryClient(":memory:", timeout_s=20.0) as opened:
        create(opened)
        yield opened


def run(standing: StandingStep, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One run: the rows that each query has found, (S, k, w, dim), zero where there is none; their positions."""
    standing.queries[0].copy_(keys)
    assert standing.enter(5.0)
    standing.launch()
    standing.leave()
    return spread(standing.index, standing.rows["key"], standing.positions)


def spread(index: torch.Tensor, found: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the index points to."""
    at = (index[0] + 1).long()
    return torch.nn.functional.pad(found, (0, 0, 1, 0))[at], torch.nn.functional.pad(positions, (1, 0), value=-1)[at]


def check(standing: StandingStep, session: Session) -> None:
    """A run finds what a step finds."""
    keys = torch.randn(2, 2)
    hits = session.retrieve(keys, [1, 1], WANTED).hits
    assert hits is not None
    for got, want in zip(run(standing, keys), spread(hits.index, hits.rows["key"], hits.positions), strict=True):
        assert torch.equal(got, want)


def test_a_run_finds_what_a_step_finds_at_that_moment(client: MemoryClient) -> None:
    """Empty, filling, full, of another writer, emptied."""
    session, other = client.session("m", NAMES), client.session("m", NAMES)
    standing = session.stand(rows(1, 2), WANTED)
    assert standing is not None
    check(standing, session)
    for count in (1, 3, 20):
        session.append(torch.randn(2 * count, 2), [count, count])
        check(standing, session)
        other.append(torch.randn(count, 2), [0, count])
        check(standing, session)
    session.reset()
    check(standing, session)
    assert (run(standing, rows(1, 2))[1] == -1).all()


def test_runs_are_counted_as_calls(client: MemoryClient) -> None:
    session = client.session("m", NAMES)
    standing = session.stand(rows(1, 2), WANTED)
    assert standing is not None
    before = client.stats.calls
    for _ in range(70):
        run(standing, rows(1, 2))
    assert client.stats.calls == before + 64
    standing.count()
    assert client.stats.calls == before + 70


@pytest.mark.parametrize("end", ["drop", "close"])
def test_there_are_no_runs_of_what_is_gone(client: MemoryClient, end: str) -> None:
    standing = client.session("m", NAMES).stand(rows(1, 2), WANTED)
    assert standing is not None
    if end == "drop":
        client.drop_memory("m")
        create(client)
    else:
        client.close()
    assert not standing.enter(1.0)


def test_the_thread_of_the_device_rests_during_a_run(client: MemoryClient) -> None:
    session = client.session("m", NAMES)
    standing = session.stand(rows(1, 2), WANTED)
    assert standing is not None
    assert standing.enter(1.0)
    under_way = session.start_step(rows(1, 2), [1, 1], retrieve=None, append=True)
    with pytest.raises(errors.Late):
        under_way.result(0.05)
    standing.launch()
    assert (standing.index == -1).all()
    standing.leave()
    session.append(rows(3, 4), [1, 1])
    assert (run(standing, rows(3, 4))[0][:, 0, 1, 0] == torch.tensor([3.0, 4.0])).all()


def test_a_run_is_not_begun_while_the_device_works() -> None:
    guests = Guests()
    guests.begin_turn()
    assert not guests.rest(False)
    entered = threading.Thread(target=guests.rest)
    entered.start()
    guests.release()
    entered.join()
    assert not guests.rest(False)


def test_an_open_circuit_allows_no_run(client: MemoryClient) -> None:
    standing = client.session("m", NAMES).stand(rows(1, 2), WANTED)
    assert standing is not None
    for _ in range(5):
        client._core.breaker.record(False)
    assert not standing.enter(1.0)
    assert client.session("m", NAMES).stand(rows(1, 2), WANTED) is None


@pytest.mark.parametrize(
    "options",
    [{"max_spilled_sequences": 2, "host_spilled_sequences": 2}, {"idle_ttl_s": 60}],
)
def test_what_a_retrieval_changes_is_asked_step_by_step(options: dict[str, Any]) -> None:
    with MemoryClient(":memory:", timeout_s=20.0) as client:
        client.create_memory("m", dim=2, capacity=16, max_sequences=4, dtype=torch.float32, **options)
        assert client.session("m", NAMES).stand(rows(1, 2), WANTED) is None


@pytest.mark.parametrize("durability", Durability)
def test_what_is_shown_only_once_it_is_synced_is_asked_step_by_step(durability: Durability) -> None:
    """There is none in a process of its own, so this asks the engine, as a server's own processes would."""
    spec = MemorySpec(name="m", dim=2, capacity=16, max_sequences=2, dtype=torch.float32, durability=durability)
    memory = Memory(spec, torch.device("cpu"), new_epoch=iter(range(1, 9)).__next__)
    keys, parts = rows(1, 2).view(1, 2, 2), tuple(SequencePart(sequence=name, num_rows=1) for name in NAMES)
    batch = StepBatch(parts=parts, layers=(0,), keys=keys, retrieve=RetrieveOptions(top_k=1))
    assert (memory.repeat(batch) is not None) == (durability is Durability.VOLATILE)
    memory.free()


def test_what_a_step_would_be_refused_is_refused(client: MemoryClient) -> None:
    session = client.session("m", NAMES)
    for keys, wanted in (
        (torch.full((2, 2), float("nan")), WANTED),
        (torch.zeros(2, 3), WANTED),
        (torch.zeros(1, 2), WANTED),
        (torch.zeros(2, 2), Retrieval(0)),
        (torch.zeros(2, 2), Retrieval(1, arrays=("value",))),
    ):
        with pytest.raises(errors.InvalidRequest):
            session.stand(keys, wanted)
    with pytest.raises(errors.NotFound):
        client.session("other", NAMES).stand(rows(1, 2), WANTED)


def test_there_are_runs_on_lent_memory_while_it_is_lent() -> None:
    with serving(Setting(lends=True)) as server, client_of(server) as client, client_of(server, "inline") as other:
        create(client)
        session = client.session("m", NAMES)
        assert session.stand(rows(1, 2), WANTED) is None
        session.append(torch.randn(6, 2), [3, 3])
        until(lambda: session.plane == "shm")
        standing = session.stand(rows(1, 2), WANTED)
        assert standing is not None
        check(standing, session)
        session.append(torch.randn(6, 2), [3, 3])
        check(standing, session)
        counted = client.stats.mapped_steps
        standing.count()
        assert client.stats.mapped_steps == counted + 2
        other.drop_memory("m")
        until(lambda: not standing.enter(1.0) or standing.leave() is not None)


def test_there_are_none_where_tensors_travel_in_messages() -> None:
    with serving(Setting()) as server, client_of(server, "inline") as client:
        create(client)
        assert client.session("m", NAMES).stand(rows(1, 2), WANTED) is None


def test_there_are_no_runs_once_a_lease_is_being_given_back() -> None:
    """From then on others know of more rows, and may write: also before the server says that the lease has ended."""
    with serving(Setting(lends=True)) as server, client_of(server) as client:
        create(client)
        session = client.session("m", NAMES)
        session.append(torch.randn(6, 2), [3, 3])
        until(lambda: session.plane == "shm")
        standing = session.stand(rows(1, 2), WANTED)
        assert standing is not None
        check(standing, session)
        transport: Any = session._core.transport
        engine = transport._engine
        engine.leave().result()
        assert engine.is_held
        assert not standing.enter(1.0)
        assert session.stand(rows(1, 2), WANTED) is None


def test_what_is_not_stood_for_leaves_no_tensor_behind() -> None:
    with serving(Setting(lends=True)) as server, client_of(server) as client:
        create(client)
        session = client.session("m", NAMES)
        session.append(torch.randn(6, 2), [3, 3])
        until(lambda: session.plane == "shm")
        transport: Any = session._core.transport
        until(lambda: transport._paused is None)
        transport._pause()
        assert session.stand(rows(1, 2), WANTED) is None
        assert len(transport.plane._handed) == 0
        transport._resume()
