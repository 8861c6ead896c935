"""Metrics: counters and histograms, named in one place, and the port where they and the probes are read."""

from __future__ import annotations

import socket
import threading
from collections import deque
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from memstore.errors import MemstoreError
from memstore.seams import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from prometheus_client.core import Metric

    from memstore.registry import Registry
    from memstore.rooms import Loaded
    from memstore.types import MemoryCounts

BUCKETS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LONG_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
SCRAPE_S = 1.0
MAX_CONNECTIONS = 64
CONNECTION_S = 5.0
"""The most that the port of metrics has open at once, and how long one lasts, whatever is said on it."""
OTHER = "other"
NAMED_MEMORIES = 100
"""Memories with metrics of their own where everyone is one tenant and nobody says how many."""
INDEX_METRICS = {
    "num_generations": (GaugeMetricFamily, "memstore_index_generations", "Generations that are searched"),
    "tail_rows": (GaugeMetricFamily, "memstore_index_tail_rows", "Live entries in no generation, which are scanned"),
    "builds_under_way": (GaugeMetricFamily, "memstore_index_builds_under_way", "Builds that run or wait"),
    "builds_done": (CounterMetricFamily, "memstore_index_builds_done", "Builds that gave a generation"),
    "builds_put_off": (CounterMetricFamily, "memstore_index_builds_put_off", "Builds that failed or found no memory"),
    "build_seconds": (CounterMetricFamily, "memstore_index_build_seconds", "Time that builds took"),
}
"""Family, name and explanation of each field of IndexCounts."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def named_memories(asked: int, *, has_tenants: bool) -> int:
    """Memories that metrics name, where `asked` for; -1: none where that would show one tenant's names to another."""
    if asked >= 0:
        return asked
    return 0 if has_tenants else NAMED_MEMORIES


class _Tally:
    """Observations that wait until there are some: a single one costs a step as much as many would.

    Registered before all metrics, it is asked first at each scrape, and counts what waits.
    """

    AT_ONCE = 32

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._counting = threading.Lock()

    def add(self, count: Callable[..., None], *arguments: Any) -> None:
        """Has `count` called with these before the next scrape. Safe from any thread."""
        self._waiting.append((count, arguments))
        if len(self._waiting) >= self.AT_ONCE:
            self.collect()

    def describe(self) -> Iterable[Metric]:
        """It has no metrics of its own."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Counts what waits."""
        with self._counting, suppress(IndexError):
            while True:
                count, arguments = self._waiting.popleft()
                count(*arguments)
        return ()


class Metrics:
    """The metrics of one server, in a registry of their own. Observes the device worker and the gRPC front."""

    def __init__(self, methods: Sequence[str], version: str, max_memories: int) -> None:
        """methods: every one has its series from the start. max_memories: beyond it, memories share one label."""
        self.registry = CollectorRegistry()
        self._tally = _Tally()
        self.registry.register(self._tally)
        self._max_memories = max_memories
        self._memories: set[str] = set()
        self._rpc = Histogram(
            "memstore_rpc_server_duration_seconds",
            "From the arrival of a call to its answer",
            ("method", "code"),
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._search = Histogram(
            "memstore_search_duration_seconds",
            "One call of a memory's step, for all requests joined in it",
            ("memory", "stage"),
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._joined = Histogram(
            "memstore_joined_requests",
            "Requests served by one call of a memory's step",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self._rows = Counter("memstore_step_rows_total", "Rows of all steps", ("memory",), registry=self.registry)
        self._cuts = Counter(
            "memstore_log_cut_bytes", "Torn ends of logs that were cut at a start, in bytes", registry=self.registry
        )
        self._recovery = Histogram(
            "memstore_recovery_duration_seconds",
            "One durable memory read back at a start",
            buckets=LONG_BUCKETS_S,
            registry=self.registry,
        )
        self._snapshots = Histogram(
            "memstore_snapshot_duration_seconds",
            "One snapshot, from its beginning to its check",
            ("outcome",),
            buckets=LONG_BUCKETS_S,
            registry=self.registry,
        )
        self._untaken = Gauge(
            "memstore_file_not_taken",
            "1 while a changed file is not taken, and what was known stays",
            ("file",),
            registry=self.registry,
        )
        self._sessions = Gauge("memstore_sessions", "Open streams", registry=self.registry)
        build = Gauge("memstore_build_info", "What runs here; always 1", ("version",), registry=self.registry)
        build.labels(version).set(1)
        for method in methods:
            self._rpc.labels(method, "OK")

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """One call was answered, or one step of a stream."""
        self._tally.add(self._count_rpc, method, code, seconds)

    def joined(self, memory: str, num_requests: int, num_rows: int, seconds: float) -> None:
        """See Observer of device.py."""
        self._tally.add(self._count_joined, memory, num_requests, num_rows, seconds)

    def recovered(self, cut_bytes: int, seconds: float) -> None:
        """See StoreObserver of store.py."""
        self._cuts.inc(cut_bytes)
        self._recovery.observe(seconds)

    def snapshot(self, outcome: str, seconds: float) -> None:
        """See StoreObserver of store.py."""
        self._snapshots.labels(outcome).observe(seconds)

    def follow(self, file: str, is_stale: Callable[[], bool]) -> None:
        """Shows, at each scrape, whether a file that is followed has been changed into one that is not taken."""
        self._untaken.labels(file).set_function(is_stale)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Counts a stream for as long as it is open."""
        self._sessions.inc()
        try:
            yield
        finally:
            self._sessions.dec()

    def watch(self, registry: Registry) -> None:
        """Shows, at each scrape, what the memories of `registry` hold and what waits for its device."""
        self.registry.register(_State(registry, self._label))

    def text(self) -> bytes:
        """All of it in the Prometheus text format."""
        return bytes(generate_latest(self.registry))

    def _count_rpc(self, method: str, code: str, seconds: float) -> None:
        self._rpc.labels(method, code).observe(seconds)

    def _count_joined(self, memory: str, num_requests: int, num_rows: int, seconds: float) -> None:
        label = self._label(memory)
        self._search.labels(label, "step").observe(seconds)
        self._joined.observe(num_requests)
        self._rows.labels(label).inc(num_rows)

    def _label(self, memory: str) -> str:
        if memory not in self._memories and len(self._memories) < self._max_memories:
            self._memories.add(memory)
        return memory if memory in self._memories else OTHER


class _State:
    """Gauges that are read from the registry when they are asked for."""

    def __init__(self, registry: Registry, label: Callable[[str], str]) -> None:
        self._registry = registry
        self._label = label

    def describe(self) -> Iterable[Metric]:
        """Nothing is promised before the first scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        admission, budget = self._registry.worker.admission, self._registry.budget
        yield GaugeMetricFamily("memstore_queue_depth", "Requests admitted, not answered", admission.num_requests)
        yield GaugeMetricFamily("memstore_queue_bytes", "Bytes of those requests", admission.num_bytes)
        yield GaugeMetricFamily("memstore_capacity_bytes", "Bytes memories may reserve", budget.capacity_bytes)
        yield GaugeMetricFamily("memstore_reserved_bytes", "Bytes memories have reserved", budget.reserved_bytes)
        yield GaugeMetricFamily(
            "memstore_damaged_memories", "Memories that could not be loaded", self._registry.num_damaged
        )
        yield GaugeMetricFamily(
            "memstore_waiting_memories", "Memories whose files cannot be read for now", self._registry.num_waiting
        )
        yield from self._of_files()
        leases = sum(len(loaded.engine.lender) for loaded in self._registry.all())
        yield GaugeMetricFamily("memstore_leases", "Sessions that sequences are lent to", leases)
        counted = self._counts()
        yield from self._of_memories(counted)
        yield from self._of_sequences(counted)
        yield from self._of_indexes(counted)

    def _of_files(self) -> Iterator[Metric]:
        log_bytes = GaugeMetricFamily("memstore_log_bytes", "Bytes of log behind the last snapshot", labels=("memory",))
        refusing = GaugeMetricFamily("memstore_read_only", "1 where the log cannot be written", labels=("memory",))
        for loaded in self._registry.all():
            if loaded.archive is not None:
                journal, label = loaded.archive.journal, (self._label(loaded.id.name),)
                log_bytes.add_metric(label, journal.log_bytes)
                refusing.add_metric(label, journal.is_refusing)
        yield from (log_bytes, refusing)

    def _of_memories(self, counted: Sequence[tuple[Loaded, MemoryCounts]]) -> Iterator[Metric]:
        rows = GaugeMetricFamily("memstore_memory_rows", "Live entries", labels=("memory",))
        capacity = GaugeMetricFamily("memstore_memory_capacity_rows", "Entries there is room for", labels=("memory",))
        appended = CounterMetricFamily("memstore_appended_rows", "Entries appended", labels=("memory",))
        evicted = CounterMetricFamily("memstore_evicted_rows", "Entries that left", labels=("memory", "reason"))
        totals: dict[str, list[int]] = {}
        for loaded, counts in counted:
            spec = loaded.spec
            total = totals.setdefault(self._label(loaded.id.name), [0, 0, 0, 0])
            room = spec.capacity * spec.max_sequences * spec.num_layers
            for i, value in enumerate((counts.num_rows, room, counts.appended_rows, counts.evicted_rows)):
                total[i] += value
        for label, total in totals.items():
            for family, value in zip((rows, capacity, appended), total, strict=False):
                family.add_metric((label,), value)
            evicted.add_metric((label, "fifo"), total[3])
        yield from (rows, capacity, appended, evicted)

    def _of_sequences(self, counted: Sequence[tuple[Loaded, MemoryCounts]]) -> Iterator[Metric]:
        """Where they lie, and how they came there."""
        lie = GaugeMetricFamily("memstore_sequences", "Sequences by where they lie", labels=("memory", "tier"))
        pinned = GaugeMetricFamily("memstore_pinned_sequences", "Sequences that stay", labels=("memory",))
        on_disk = GaugeMetricFamily("memstore_spilled_bytes", "Bytes of files of sequences", labels=("memory",))
        spills = CounterMetricFamily("memstore_spills", "Times that a sequence left the device", labels=("memory",))
        returns = CounterMetricFamily("memstore_spill_returns", "Times that one came back", labels=("memory",))
        refusals = CounterMetricFamily(
            "memstore_spill_refusals", "Times that a file of one could not be written", labels=("memory",)
        )
        expired = CounterMetricFamily("memstore_expired_sequences", "Sequences ended for idleness", labels=("memory",))
        totals: dict[str, list[int]] = {}
        for loaded, counts in counted:
            spill = counts.spill
            where = (counts.num_sequences, 0, 0, 0, 0, 0, 0)
            if spill is not None:
                lying = spill.num_on_host, spill.num_on_disk
                away = *lying, spill.disk_bytes, spill.spills, spill.returns, spill.refusals
                where = (counts.num_sequences - sum(lying), *away)
            total = totals.setdefault(self._label(loaded.id.name), [0] * 9)
            for i, value in enumerate((*where, counts.num_pinned, counts.expired_sequences)):
                total[i] += value
        for label, total in totals.items():
            for tier, value in zip(("device", "host", "disk"), total, strict=False):
                lie.add_metric((label, tier), value)
            for family, value in zip((on_disk, spills, returns, refusals, pinned, expired), total[3:], strict=True):
                family.add_metric((label,), value)
        yield from (lie, pinned, on_disk, spills, returns, refusals, expired)

    def _of_indexes(self, counted: Sequence[tuple[Loaded, MemoryCounts]]) -> Iterator[Metric]:
        """Of those that keep something."""
        for field, (family, name, explanation) in INDEX_METRICS.items():
            totals: dict[str, float] = {}
            for loaded, counts in counted:
                if counts.index is not None:
                    label = self._label(loaded.id.name)
                    totals[label] = totals.get(label, 0) + getattr(counts.index, field)
            metric = family(name, explanation, labels=("memory",))
            for label, total in totals.items():
                metric.add_metric((label,), total)
            yield metric

    def _counts(self) -> list[tuple[Loaded, MemoryCounts]]:
        """What the device thread says within a second; nothing where it is too busy, or gone."""
        memories = self._registry.all()
        try:
            counted = self._registry.worker.control(lambda: [loaded.engine.counts() for loaded in memories])
            return list(zip(memories, counted.result(SCRAPE_S), strict=True))
        except (MemstoreError, FutureTimeout):
            return []


class BoundedHTTPServer(ThreadingHTTPServer):
    """A thread for each of at most MAX_CONNECTIONS connections, none of which lasts longer than CONNECTION_S."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._clock = SystemClock()
        self._since: dict[Any, float] = {}
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """False closes one more connection at once."""
        return len(self._since) < MAX_CONNECTIONS

    def process_request(self, request: Any, client_address: Any) -> None:
        self._since[request] = self._clock.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._since.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called twice a second: ends what has lasted too long, however busy it seems."""
        now = self._clock.monotonic()
        for request, since in tuple(self._since.items()):
            if now - since > CONNECTION_S:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that breaks off, or is broken off, is not worth a word."""


class MetricsServer:
    """A plain HTTP port with /metrics, /livez and /readyz, and nothing else."""

    def __init__(self, address: tuple[str, int], metrics: Metrics, is_ready: Callable[[], bool]) -> None:
        """Binds and serves in a thread of its own. OSError when the address is taken."""

        class Handler(BaseHTTPRequestHandler):
            """Answers the three paths."""

            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/metrics":
                        self._answer(200, metrics.text())
                    case "/livez":
                        self._answer(200, b"alive\n")
                    case "/readyz":
                        ready = is_ready()
                        self._answer(200 if ready else 503, b"ready\n" if ready else b"not ready\n")
                    case _:
                        self._answer(404, b"no such path\n")

            def _answer(self, code: int, content: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                """Requests are not logged."""

        self._server = BoundedHTTPServer(address, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="memstore-metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Gives the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
