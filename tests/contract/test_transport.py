"""What every client does over every transport: in process, unary calls, one stream; blocking and awaited."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib.util
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from model_client import AsyncMemoryClient, MemoryClient, Retrieval, errors
from tests.serving import Setting, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.serving import Serving

KINDS = ["process", "grpc", "grpc-stream", "shm", pytest.param("cuda", marks=pytest.mark.gpu)]
PLANES = {"shm": "shm", "cuda": "cuda"}
MODES = ["sync", "asyncio"]
HAS_FAISS = importlib.util.find_spec("faiss") is not None
INDEXES = ["exact", pytest.param("faiss_flat", marks=pytest.mark.skipif(not HAS_FAISS, reason="no FAISS"))]


class Awaited:
    """A client for asyncio, or a session or pending step of it, with every coroutine run to its end."""

    def __init__(self, inner: object, runner: asyncio.Runner) -> None:
        self._inner = inner
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute):
            return attribute

        def call(*arguments: object, **options: object) -> Any:
            async def run() -> object:
                result = attribute(*arguments, **options)
                return await result if asyncio.iscoroutine(result) else result

            result = self._runner.run(run())
            is_ours = type(result).__name__ in ("AsyncSession", "AsyncPendingStep")
            return Awaited(result, self._runner) if is_ours else result

        return call


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], Serving]]:
    """A server for each device, made when it is first asked for."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda device: stack.enter_context(serving(Setting(lends=True, device=device))))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture
def server(servers: Callable[[str], Serving], kind: str) -> Serving:
    return servers("cuda" if kind == "cuda" else "cpu")


@pytest.fixture(params=MODES)
def client(request: pytest.FixtureRequest, server: Serving, kind: str) -> Iterator[Any]:
    """A client, and nothing left of it afterwards but what there was."""
    threads = set(threading.enumerate())
    target = ":memory:" if kind == "process" else server.target
    plane = PLANES.get(kind, "inline")
    options: dict[str, Any] = {
        "timeout_s": 20.0,
        "use_stream": kind != "grpc",
        "plane": "inline" if plane == "process" else plane,
    }
    if request.param == "sync":
        with MemoryClient(target, **options) as made:
            yield made
            _drop_all(made)
    else:
        with asyncio.Runner() as runner:
            awaited = Awaited(AsyncMemoryClient(target, **options), runner)
            yield awaited
            _drop_all(awaited)
            awaited.close()
    while left := set(threading.enumerate()) - threads:  # the test's own time limit ends it otherwise
        for thread in left:
            if thread.ident is not None:  # it has begun
                thread.join(timeout=0.1)


def _drop_all(client: Any) -> None:
    with contextlib.suppress(errors.ClientClosed):
        for each in client.list_memories():
            client.drop_memory(each.spec.name)


def create(client: Any, **options: Any) -> None:
    client.create_memory("m", **{"dim": 4, "capacity": 8, "max_sequences": 4, "dtype": torch.float32, **options})


def test_it_says_how_it_travels(client: Any, kind: str) -> None:
    create(client)
    session = client.session("m", ["a"])
    session.append(torch.ones(1, 4), [1])
    assert client.transport == kind
    assert session.plane == {"process": "process", **PLANES}.get(kind, "inline")
    assert client.info().device == ("cuda:0" if kind == "cuda" else "cpu")


def test_the_life_of_a_memory(client: Any) -> None:
    made = client.create_memory("m", dim=4, capacity=8, num_layers=2, tags={"owner": "me"})
    assert (made.spec.dim, made.spec.num_layers, made.spec.max_sequences, dict(made.spec.tags)) == (
        4,
        2,
        1,
        {"owner": "me"},
    )
    with pytest.raises(errors.AlreadyExists):
        client.create_memory("m", dim=5, capacity=8, num_layers=2)
    assert client.create_memory("m", dim=4, capacity=8, num_layers=2, tags={"owner": "me"}, exist_ok=True) == made
    client.create_memory("other", dim=1, capacity=1)
    assert [each.spec.name for each in client.list_memories()] == ["m", "other"]
    assert [each.spec.name for each in client.list_memories("o")] == ["other"]
    assert client.describe_memory("m").status.num_rows == 0
    client.drop_memory("m")
    with pytest.raises(errors.NotFound) as raised:
        client.describe_memory("m")
    assert raised.value.reason == "NOT_FOUND"


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_step_retrieves_and_then_appends(client: Any, dtype: torch.dtype, index: str, device: torch.device) -> None:
    create(client, dtype=dtype, index=index)
    session = client.session("m", ["a", "b"])
    keys = torch.arange(20).reshape(5, 4).to(device, dtype)
    first = session.step(keys, [3, 2], retrieve=Retrieval(2, before=1, after=1), append=True)
    assert [(each.as_of, each.first_position, each.num_appended) for each in first.sequences] == [(0, 0, 3), (0, 0, 2)]
    assert (first.hits.index == -1).all()
    second = session.step(keys, [3, 2], retrieve=Retrieval(1, before=1, after=1), append=True)
    hits = second.hits
    assert hits.index.shape == (1, 5, 1, 3)
    assert hits.index.device.type == hits.rows["key"].device.type == device.type
    assert hits.rows["key"].dtype == dtype
    middle = hits.index[0, :, 0, 1].long()
    assert torch.equal(hits.rows["key"][middle], keys)
    assert hits.positions[middle].tolist() == [0, 1, 2, 0, 1]
    assert (hits.index[0, [0, 3], 0, 0] == -1).all()
    assert hits.row_splits.tolist() == [0, 3, 5]
    assert hits.scores.dtype == torch.float32


def test_layers_payloads_and_no_scores(client: Any) -> None:
    create(client, num_layers=2, payloads={"hidden": (torch.bfloat16, (3,)), "number": (torch.int64, (1,))})
    session = client.session("m", ["a"])
    keys = torch.randn(2, 3, 4)
    payloads = {"hidden": torch.randn(2, 3, 3).bfloat16(), "number": torch.arange(6).reshape(2, 3, 1)}
    session.append(keys, [3], payloads=payloads)
    retrieval = Retrieval(1, arrays=("number", "hidden"), scores=False)
    hits = session.retrieve(keys, [3], retrieval).hits
    assert set(hits.rows) == {"number", "hidden"}
    assert hits.scores is None
    order = hits.index.reshape(-1).long()
    assert hits.rows["number"][order, 0].tolist() == list(range(6))
    assert torch.equal(hits.rows["hidden"][order], payloads["hidden"].reshape(6, 3))
    bare = session.retrieve(keys, [3], Retrieval(1, arrays=())).hits
    assert bare.rows == {}
    assert len(bare.positions) == 6


def test_parts_starts_reset_and_fork(client: Any) -> None:
    create(client)
    session = client.session("m", ["a", "b", "c"])
    session.append(torch.ones(6, 4), [2, 2, 2])
    result = session.step(
        torch.ones(2, 4), [1, 1], retrieve=None, append=True, parts=[2, 0], start_of_sequence=[True, False]
    )
    assert [each.first_position for each in result.sequences] == [0, 2]
    assert result.hits is None
    reply = session.fork("a", "d")
    assert (reply.next_position, reply.live_begin) == (3, 0)
    client.reset("m", ["d"], release=True)
    assert client.fork("m", "a", "e", as_of=1).next_position == 1
    session.reset()
    assert session.append(torch.ones(3, 4), [1, 1, 1]).sequences[0].first_position == 0
    assert client.reset("m", ["a", "nobody"])[1] == 0
    assert client.reset("m", ["a"], release=True) == [0]


def test_more_sequences_than_places_and_pins(client: Any) -> None:
    create(client, max_sequences=2, max_spilled_sequences=2, host_spilled_sequences=2, idle_ttl_s=3600)
    sessions = [client.session("m", names) for names in (["a", "b"], ["c", "d"])]
    for number in range(3):
        for which, session in enumerate(sessions):
            keys = torch.full((2, 4), float(10 * which + number))
            result = session.step(keys, [1, 1], retrieve=Retrieval(1), append=True)
            assert [each.first_position for each in result.sequences] == [number, number]
            if number:
                assert torch.unique(result.hits.rows["key"]).tolist() == [10 * which + number - 1]
    status = client.describe_memory("m").status
    assert (status.num_sequences, status.spill.num_resident, status.spill.num_on_host) == (4, 2, 2)
    assert status.spill.returns >= 4
    assert client.pin("m", ["c", "d"]) == 2
    with pytest.raises((errors.QuotaExceeded, errors.NotReady)):
        client.fork("m", "a", "e")
    assert client.pin("m", ["c", "d"], unpin=True) == 0
    assert client.reset("m", list("abcd"), release=True) == [0] * 4
    with pytest.raises(errors.NotFound):
        client.pin("m", ["a"])


def test_a_sequence_that_somebody_else_reset_is_begun_again(client: Any) -> None:
    create(client)
    session = client.session("m", ["a", "b"])
    session.append(torch.ones(4, 4), [2, 2])
    client.reset("m", ["b"])
    result = session.append(torch.ones(2, 4), [1, 1])
    assert [each.first_position for each in result.sequences] == [2, 0]
    assert client.stats.lost_epochs == 1


def test_several_steps_under_way_are_each_given_their_own_answer(client: Any) -> None:
    create(client, capacity=64)
    session = client.session("m", ["a"])
    session.append(torch.eye(4), [4])
    pendings = [
        session.start_step(torch.eye(4)[index : index + 1], [1], retrieve=Retrieval(1), append=False)
        for index in (3, 0, 2, 1, 0)
    ]
    found = [int(pending.result().hits.positions[0]) for pending in reversed(pendings)]
    assert found == [0, 1, 2, 0, 3]


def test_two_appends_under_way(client: Any) -> None:
    create(client, capacity=64)
    session = client.session("m", ["a"])
    session.append(torch.ones(1, 4), [1])
    pendings = [session.start_step(torch.ones(2, 4), [2], retrieve=None, append=True) for _ in range(2)]
    assert [pending.result().sequences[0].first_position for pending in pendings] == [1, 3]


def test_refusals_arrive_as_they_are(client: Any) -> None:
    create(client)
    session = client.session("m", ["a"])
    with pytest.raises(errors.InvalidRequest) as raised:
        session.append(torch.full((1, 4), float("nan")), [1])
    assert raised.value.metadata["field"].startswith("keys")
    with pytest.raises(errors.InvalidRequest):
        session.append(torch.ones(1, 5), [1])
    with pytest.raises(errors.NotFound):
        client.session("nothing", ["a"]).append(torch.ones(1, 4), [1])
    crowd = client.session("m", list("abcdefgh"))
    with pytest.raises(errors.QuotaExceeded):
        crowd.append(torch.ones(8, 4), [1] * 8)
    assert session.append(torch.ones(1, 4), [1]).sequences[0].first_position == 0
    assert client.stats.failures == 4


def test_a_step_that_is_too_late_is_not_waited_for(client: Any, server: Serving, kind: str) -> None:
    create(client)
    session = client.session("m", ["a"])
    num_rows = 2
    with pytest.raises((errors.Late, errors.Expired)):
        while True:  # an answer may be there before anybody has looked for it
            session.append(torch.ones(2, 4), [2], deadline_s=0.0)
            num_rows += 2
    result = session.append(torch.ones(1, 4), [1])
    assert result.sequences[0].first_position == num_rows, "the late rows come first"
    assert client.stats.late == 1


def test_a_closed_client_says_so(client: Any) -> None:
    client.close()
    client.close()
    with pytest.raises(errors.ClientClosed):
        client.info()


def test_counters(client: Any, kind: str) -> None:
    create(client)
    session = client.session("m", ["a"])
    session.append(torch.ones(100, 4), [100])
    hits = session.retrieve(torch.ones(2, 4), [2], Retrieval(3)).hits
    assert hits.index.shape == (1, 2, 3, 1)
    stats = client.stats.as_dict()
    assert stats["calls"] == 3
    assert stats["failures"] == 0
    if kind == "process":
        assert stats["sent_bytes"] == stats["received_bytes"] == 0
    elif kind in ("shm", "cuda"):
        assert stats["sent_bytes"] < 1000, "rows do not travel"
        assert stats["mapped_steps"] == 2
    else:
        assert stats["sent_bytes"] > 102 * 16
        assert stats["received_bytes"] > 3 * 16


def prefix_read(reader: Any, keys: torch.Tensor, counts: list[int], options: Retrieval, end: int) -> Any:
    """Hits of a read that sees all positions up to `end`: others see rows of a lease once a GPU has written them."""
    while True:
        result = reader.retrieve(keys, counts, options)
        if all(sequence.as_of == end for sequence in result.sequences):
            return result.hits


def test_rows_that_have_come_do_not_travel_again(client: Any, kind: str, device: torch.device) -> None:
    create(client, dim=16, capacity=2048, num_layers=2, dtype=torch.float16, payloads={"n": (torch.int64, (8,))})
    session, reader = client.session("m", ["a", "b"]), client.session("m", ["a", "b"])
    options = Retrieval(8, after=1, arrays=("key", "n"))
    num_found = 0
    for number in range(4):
        keys = torch.randn(2, 512, 16, device=device).half()
        session.append(keys, [256, 256], payloads={"n": torch.randint(1 << 40, (2, 512, 8), device=device)})
        want = prefix_read(reader, keys[:, ::8], [32, 32], options, 256 * (number + 1))  # too few for any to be kept
        got = session.retrieve(keys, [256, 256], options).hits
        is_hit = want.index >= 0
        mine, others = got.index[:, ::8][is_hit].long(), want.index[is_hit].long()
        for name in ("key", "n"):
            assert got.rows[name].device.type == device.type
            assert torch.equal(got.rows[name][mine], want.rows[name][others])
        num_found += len(got.positions)
    reused = client.stats.reused_rows
    assert 0 < reused < num_found if kind.startswith("grpc") else reused == 0


@pytest.mark.parametrize("use_stream", [True, False])
def test_a_client_that_is_let_go_of_leaves_no_threads(server: Serving, kind: str, use_stream: bool) -> None:
    threads = set(threading.enumerate())
    plane = PLANES.get(kind, "inline")
    client = MemoryClient(
        ":memory:" if kind == "process" else server.target,
        use_stream=use_stream,
        plane="inline" if plane == "process" else plane,
    )
    create(client)
    session = client.session("m", ["a"])
    session.start_step(torch.ones(1, 4), [1], retrieve=Retrieval(1), append=True)
    client.drop_memory("m")
    del client, session
    gc.collect()
    while left := set(threading.enumerate()) - threads:  # the test's own time limit ends it otherwise
        for thread in left:
            if thread.ident is not None:  # it has begun
                thread.join(timeout=0.1)
