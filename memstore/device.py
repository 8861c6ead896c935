"""DeviceWorker: the one thread that touches a device, the queue before it, and the joining of its searches."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from memstore.config import ConfigError
from memstore.errors import DeviceMemoryFull, Expired, Internal, MemstoreError, NotReady, Overloaded
from memstore.jobs import CallJob, Engine, Job, StepJob, Ticket
from memstore.joining import Group
from memstore.logs import trouble
from memstore.standing import Guests
from memstore.turns import SERVER, Turns
from memstore.types import CAPTURE_ERRORS, NO_ROOM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from memstore.admission import Admission
    from memstore.jobs import Settling
    from memstore.seams import Clock
    from memstore.types import Hits, StepBatch, StepResult

_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation, the error code of torch.AcceleratorError where pinned host memory is missing."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who is told what the worker did; called in its thread, must be quick."""

    def joined(self, memory: str, num_requests: int, num_rows: int, seconds: float) -> None:
        """One call of Memory.step served so many requests."""


class Unobserved:
    """Nobody is told."""

    def joined(self, memory: str, num_requests: int, num_rows: int, seconds: float) -> None:
        """Nothing happens."""


Groups = dict[int, "Group[Engine, StepJob[object]]"]
"""By the id of their engine."""


def _changes(batch: StepBatch) -> bool:
    return batch.append or any(part.start_of_sequence for part in batch.parts)


def device_of(name: str) -> torch.device:
    """The device of a name such as "auto", "cpu", "cuda" or "cuda:1". ConfigError where there is none such here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device(name if ":" in name else f"{name}:0")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device={name}: there is no such device here")
    return device


class DeviceWorker:
    """One thread that owns a device and every memory on it.

    The answers of a durable memory leave when its changes are safe; meanwhile the thread goes on.
    Tenants take turns (turns.py); whatever is queued of one is taken at once and never waited for, and steps that can
    be joined become one Memory.step. The order of a tenant's jobs is kept. A request whose deadline has passed never
    reaches the device; one that would wait longer than until its deadline is refused at once.
    """

    def __init__(
        self,
        device: torch.device,
        admission: Admission,
        clock: Clock,
        observer: Observer | None = None,
        *,
        has_thread: bool = True,
    ) -> None:
        """has_thread: False where somebody else's thread calls `serve`, one at a time."""
        self.device = device
        self.admission = admission
        self.guests = Guests()
        """Who reads the device while its thread is at rest."""
        self.is_sick = False
        self._failed = f"device {device} has failed; the server must be restarted"
        self.on_sick: Callable[[], None] = _nobody
        self._clock = clock
        self._observer = observer or Unobserved()
        self._turns: Turns[Job[object]] = Turns()
        self._num_begun = 0  # jobs of this turn that were neither late nor given up
        self._arrived = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"memstore-{device}", daemon=True)
        if has_thread:
            self._thread.start()

    def submit(self, job: Job[T]) -> Future[T]:
        """Queues a job. Raises Overloaded when the queue is full, or too long for its deadline; Expired."""
        self._check_deadline(job.ticket)
        self.admission.admit(job.ticket.tenant, job.ticket.num_bytes)
        return self._enqueue(job, job.ticket.tenant)

    def control(self, run: Callable[[], T], engine: Settling | None = None, *, behind: str = SERVER) -> Future[T]:
        """Queues the server's own work, past admission. engine: see CallJob.

        behind: a tenant whose jobs before it are done first; without one it is done as soon as may be.
        """
        return self._enqueue(CallJob(_CONTROL, run, engine), behind)

    def close(self) -> None:
        """Serves what is queued, refuses what comes after, and ends the thread."""
        with self._arrived:
            self._is_closed = True
            self._arrived.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self.guests.close()

    def serve(self, *, waits: bool = True) -> bool:
        """Serves one turn, waiting for the first job where it shall; False where there was none, or none will come."""
        jobs: list[Job[object]] = []
        try:
            with self._arrived:
                self._turns.end(self._clock.monotonic(), self._num_begun)
                while waits and not self._turns and not self._is_closed:
                    self._arrived.wait()
                if not self._turns:
                    return False
            self._num_begun = 0
            self.guests.begin_turn()  # before jobs are taken: waiting for guests is no work, and others may come
            try:
                with self._arrived:
                    jobs = self._turns.take(self._clock.monotonic())
                self._serve(jobs)
            finally:
                self.guests.release()
        except Exception as error:  # the root of the thread
            self._give_up(error, jobs)
            return False
        return True

    def _enqueue(self, job: Job[T], lane: str) -> Future[T]:
        with self._arrived:
            late_s = 0.0 if self._is_closed else self._late_s(job.ticket)
            if late_s <= 0 and not self._is_closed:
                self._turns.put(lane, job)  # type: ignore[arg-type]  # only this job's own code meets its answer
                self._arrived.notify()
                return job.future
        self._release(job, 0.0)
        if late_s > 0:
            raise Overloaded("the device is busy until after the deadline; nothing was done", late_s)
        raise NotReady(self._failed if self.is_sick else "the server is stopping")

    def _late_s(self, ticket: Ticket) -> float:
        """How long after its deadline a job should be answered, by those before; not above 0 where it can be in time.

        Where nothing is in its way it is never late: or else what it takes would not be learnt again.
        """
        if ticket.deadline is None:
            return 0.0
        now = self._clock.monotonic()
        finish_s = self._turns.finish_s(ticket.tenant, now)
        return finish_s and now + finish_s - ticket.deadline

    def _check_deadline(self, ticket: Ticket) -> None:
        if ticket.deadline is not None and self._clock.monotonic() >= ticket.deadline:
            raise Expired("the deadline passed before the device was touched; nothing was done")

    def _run(self) -> None:
        try:
            self._set_up()
        except Exception as error:  # the root, as in `serve`
            self._give_up(error, [])
        with torch.no_grad():  # not inference_mode: rows handed over in process may enter the reader's autograd
            while self.serve():
                pass

    def _set_up(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # before what is built in the background
            torch.cuda.set_stream(torch.cuda.Stream(self.device, priority=-1))  # type: ignore[no-untyped-call]

    def _serve(self, jobs: list[Job[object]]) -> None:
        groups: Groups = {}
        for job in jobs:
            if isinstance(job, StepJob):
                self._join(job, groups)
            elif isinstance(job, CallJob):
                self._flush(groups)
                self._call(job)
        self._flush(groups)

    def _join(self, job: StepJob[object], groups: Groups) -> None:
        """Puts a step into its memory's group, serving the group first where they cannot be joined."""
        batch = self._guarded(job, job.decode)
        if batch is None:
            return
        group = groups.setdefault(id(job.engine), Group(job.engine))
        if not group.takes(batch):
            self._step(groups.pop(id(job.engine)))
            group = groups[id(job.engine)] = Group(job.engine)
        group.add(job, batch)

    def _flush(self, groups: Groups) -> None:
        for group in groups.values():
            self._step(group)
        groups.clear()

    def _call(self, job: CallJob[object]) -> None:
        begin = self._clock.monotonic()
        outcome = self._guarded(job, lambda: (job.run(),))
        if outcome is None:
            return
        served_s = self._clock.monotonic() - begin

        def answer(problem: MemstoreError | None) -> None:
            if problem is None:
                self._finish(job, outcome[0], served_s)
            else:
                self._fail(job, problem)

        if job.engine is None:
            answer(None)
        else:
            job.engine.settle(answer)

    def _step(self, group: Group[Engine, StepJob[object]]) -> None:
        begin = self._clock.monotonic()
        try:
            results = group.engine.step(group.batches, lambda at, hits: self._carry(group.jobs[at], hits))
        except Exception as error:  # the root: a bug in the engine fails these requests, not the thread
            for job in group.jobs:
                self._fail(job, self._known(error, job))
            return
        served_s = self._clock.monotonic() - begin
        self._observer.joined(group.jobs[0].memory, len(group.jobs), group.num_rows, served_s)
        group.engine.settle(lambda problem: self._answer_all(group, results, problem, served_s / len(group.jobs)))

    def _answer_all(
        self,
        group: Group[Engine, StepJob[object]],
        results: Sequence[StepResult | MemstoreError],
        problem: MemstoreError | None,
        served_s: float,
    ) -> None:
        """Answers the jobs of a group, in the thread that knows that they may be answered.

        problem: why it is not known whether what they changed lasts.
        """
        for job, batch, result in zip(group.jobs, group.batches, results, strict=True):
            self._answer(job, problem if problem is not None and _changes(batch) else result, served_s)

    def _carry(self, job: StepJob[object], hits: Hits) -> None:
        """Hands a step its hits. Whatever goes wrong there refuses this step alone, and nothing of it is done."""
        try:
            job.reply.carry(hits)
        except Exception as error:  # the root, as above
            raise self._known(error, job) from error

    def _answer(self, job: StepJob[object], result: StepResult | MemstoreError, served_s: float) -> None:
        if isinstance(result, MemstoreError):
            self._fail(job, result)
            return
        try:
            message = job.reply.finish(result.sequences)
        except Exception as error:  # the root, as above
            self._fail(job, self._known(error, job))
            return
        self._finish(job, message, served_s)

    def _guarded(self, job: Job[object], run: Callable[[], T]) -> T | None:
        """What `run` gives; None where the job is cancelled, late or fails, and its future is settled then."""
        if not job.future.set_running_or_notify_cancel():
            self._release(job, 0.0)
            return None
        try:
            if self.is_sick:
                raise NotReady(self._failed)
            self._check_deadline(job.ticket)
            self._num_begun += 1
            return run()
        except Exception as error:  # the root, as above
            self._fail(job, self._known(error, job))
            return None

    def _known(self, error: Exception, job: Job[object]) -> MemstoreError:
        """The error that the caller sees: ours as it is, anything else logged and closed up."""
        if isinstance(error, MemstoreError):
            return error
        if isinstance(error, NO_ROOM) or getattr(error, "error_code", None) == _OUT_OF_MEMORY:
            return DeviceMemoryFull("no working memory is left on the device for this request")
        if isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) not in CAPTURE_ERRORS:
            self._sicken()
        trouble(_log, "request failed", error, request_id=job.ticket.request_id, device=str(self.device))
        return Internal(job.ticket.request_id)

    def _give_up(self, error: Exception, jobs: Sequence[Job[object]]) -> None:
        """After a bug beside the requests, as after a failure of the device: nothing is known to be as it should."""
        trouble(_log, "the device's thread failed", error, device=str(self.device))
        self._sicken()
        with self._arrived:
            self._is_closed = True
            waiting = self._turns.clear()
        for job in (*jobs, *waiting):
            if not job.future.done():
                with suppress(Exception):  # what failed may be what this needs
                    self._fail(job, Internal(job.ticket.request_id))

    def _sicken(self) -> None:
        if not self.is_sick:
            self.is_sick = True
            self.on_sick()

    def _release(self, job: Job[T], served_s: float) -> None:
        if job.ticket is not _CONTROL:
            self.admission.release(job.ticket.tenant, job.ticket.num_bytes, served_s)

    def _finish(self, job: Job[object], outcome: object, served_s: float) -> None:
        self._release(job, served_s)
        job.future.set_result(outcome)

    def _fail(self, job: Job[object], error: MemstoreError) -> None:
        self._release(job, 0.0)
        if isinstance(job, StepJob):
            job.reply.discard()
        job.future.set_exception(error)


def _nobody() -> None:
    """Nobody wants to know that the device has failed."""


_CONTROL = Ticket(tenant="", num_bytes=0, deadline=None, request_id="server")
