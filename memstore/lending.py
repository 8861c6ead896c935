"""Lending: hands memories to processes of this host and user, and learns when they are done with them."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from memstore import status, wire
from memstore.control import LAYOUT, ControlBlock
from memstore.errors import Corrupt, InvalidRequest, MemstoreError, NotAllowed, QuotaExceeded
from memstore.logs import event, trouble
from memstore.mapped import device_name, mapped_slab
from memstore.quotas import SEQUENCES_A_LEASE, Lent
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    import torch

    from memstore.descriptors import Handover, Link
    from memstore.lease import Lease
    from memstore.registry import Registry
    from memstore.rooms import Loaded

MAX_LEASES = 256
"""Leases that one server has given out, or offered, at once; each takes two descriptors and a control block."""
TENANT_LEASES = MAX_LEASES // 4
"""Those of one tenant, where there are several and nobody says how many: enough for the models of a host, and few
enough that others find some left.
"""
MAX_LENT = MAX_LEASES * SEQUENCES_A_LEASE
"""Sequences of all of them: a control block has 32 KiB for each, which no memory reserves."""
WELCOME_S = 5.0
"""How often it is looked at whether the credentials that leases were asked for with are good still."""
SETTLE_S = 1.0
"""How long a GPU may still be writing for a process whose connection has ended."""
_log = logging.getLogger(__name__)


def _nobody(_: bytes) -> None:
    """A packet that nobody waits for."""


def _nothing() -> None:
    """Nobody needs to know."""


def _always() -> bool:
    """Every holder is welcome."""
    return True


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class Lending:
    """The leases of all memories of a registry. Lives on the event loop of its handover."""

    def __init__(self, registry: Registry, handover: Handover, loop: asyncio.AbstractEventLoop) -> None:
        self.holders: set[Holder] = set()
        """Those that have a lease or its token."""
        self.loop = loop
        self.registry = registry
        self._handover = handover
        self._looking = loop.call_later(WELCOME_S, self._look)

    @property
    def plane(self) -> pb.Plane.ValueType:
        """The plane on which memories are lent."""
        return plane_of(self.registry.worker.device)

    def offer(
        self, request: pb.OpenPlaneRequest, tenant: str, is_welcome: Callable[[], bool] = _always
    ) -> pb.OpenPlaneResponse:
        """A token for the lease that is asked for. Raises what is wrong with the request, QuotaExceeded, NotAllowed.

        is_welcome: False once the caller's credential is good no more; the lease is recalled then.
        """
        loaded = self.registry.find(tenant, request.memory)
        wire.sequence_names(request.sequences, "sequences")
        wire.writer_name(request.writer, "writer")
        if loaded.engine.region is None:
            raise NotAllowed(f"memory: {request.memory!r} is not lent")
        if request.plane not in (pb.PLANE_UNSPECIFIED, self.plane):
            raise NotAllowed(f"plane: the memory lies in {pb.Plane.Name(self.plane)}")
        own = [holder.num_sequences for holder in self.holders if holder.tenant == tenant]
        self.registry.quotas.check_lent(tenant, Lent(leases=len(own), sequences=sum(own)), len(request.sequences))
        if len(self.holders) >= MAX_LEASES:
            raise QuotaExceeded("no more leases can be given out")
        if sum(holder.num_sequences for holder in self.holders) + len(request.sequences) > MAX_LENT:
            raise QuotaExceeded("sequences: no more can be lent")
        holder = Holder(self, loaded, request, is_welcome)
        self.holders.add(holder)
        token = self._handover.offer(holder.claimed, holder.let_go)
        return pb.OpenPlaneResponse(socket_path=self._handover.path, token=token)

    def recall_unwelcome(self) -> None:
        """Asks back, in the loop, what processes hold whose credentials are good no more."""
        for holder in self.holders:
            holder.check_welcome()

    def _look(self) -> None:
        self.recall_unwelcome()
        self._looking = self.loop.call_later(WELCOME_S, self._look)

    def close(self) -> None:
        """Ends lending, in the loop. Leases are not ended: their holders may go on, and find a successor."""
        self._looking.cancel()
        self._handover.close()
        for holder in tuple(self.holders):
            holder.let_go()


class Holder:
    """A process that asks for a lease, has it, and gives it back or dies. On the loop, where nothing else is said."""

    def __init__(
        self, lending: Lending, loaded: Loaded, request: pb.OpenPlaneRequest, is_welcome: Callable[[], bool]
    ) -> None:
        self._lending = lending
        self._is_welcome = is_welcome
        self._loaded = loaded
        self._request = request
        self._link: Link | None = None
        self._lease: Lease | None = None
        self._has_ended = False  # there is no lease any more, nor will there be
        self.num_sequences = len(request.sequences)
        self.tenant = loaded.id.tenant

    def claimed(self, link: Link, claim: pb.ClaimRequest) -> None:
        """The token was presented."""
        self._link = link
        link.on_packet, link.on_close = self._heard, self._gone
        remains = claim.remains if claim.HasField("remains") else None
        descriptors = link.take_descriptors()
        self._in_device_thread(lambda: self._grant(link, remains, descriptors), lambda: _close_all(descriptors))

    def check_welcome(self) -> None:
        """Asks the lease back, once, where the credential it was asked for with is good no more."""
        if self._lease is not None and not self._lease.is_recalled and not self._is_welcome():
            event(_log, logging.INFO, "lease recalled, its credential has ended", memory=self._loaded.id.name)
            self._in_device_thread(self._ask_back)

    def _ask_back(self) -> None:
        if self._lease is not None and self._lease in self._loaded.engine.lender:
            self._lease.ask_back()

    def let_go(self) -> None:
        """Forgets the process, which keeps its lease, if it has one."""
        self._lending.holders.discard(self)
        if self._link is not None:
            self._link.on_packet, self._link.on_close = _nobody, _nothing
            self._link.close()

    def _grant(self, link: Link, remains: pb.MappedMemory | None, descriptors: list[int]) -> None:
        """Makes the lease and hands it over; the descriptors are still the caller's. Runs in the device thread."""
        lender = self._loaded.engine.lender
        try:
            if remains is not None:
                num_found = self._restore(remains, descriptors)
                event(_log, logging.INFO, "sequences found again", memory=self._loaded.id.name, num_sequences=num_found)
            names = list(self._request.sequences)
            lease = lender.lend(names, self._request.writer, self._recall, self._ended)
        except MemstoreError as error:
            failure = status.to_failure(status.answer(error, "lease"))
            link.send(pb.ClaimResponse(failure=failure).SerializeToString())
            self._ended()
            return
        self._lease = lease
        wire.leave_states(lease.block, lender.states(lease))
        response = pb.ClaimResponse(mapped=describe(self._loaded, lease))
        region = self._loaded.engine.region
        if region is not None:
            link.send(response.SerializeToString(), (region.descriptor, lease.block.region.descriptor))
        event(_log, logging.INFO, "lent", memory=self._loaded.id.name, num_sequences=len(names))

    def _restore(self, remains: pb.MappedMemory, descriptors: list[int]) -> int:
        """Copies what the holder has of a server that has gone; its descriptors are closed afterwards."""
        if len(descriptors) != 2 or wire.decode_mapped(remains) != self._loaded.spec:
            raise InvalidRequest("remains", "not of a memory of this spec")
        engine = self._loaded.engine
        try:
            block = ControlBlock.map(descriptors[1], remains.num_sequences)
            try:
                states = wire.found_states(block)
            finally:
                block.close()
            if any(state.place >= engine.spec.max_sequences for state in states):
                raise Corrupt("a place beyond the slab")
            slab = mapped_slab(remains, engine.spec, descriptors[0], engine.device)
        except OSError as error:
            raise InvalidRequest("remains", f"cannot be mapped: {error.strerror}") from error
        try:
            return engine.lender.restore(slab, states)
        finally:
            slab.free()

    def _heard(self, packet: bytes) -> None:
        """The lease is given back. Raises where anything else is said."""
        try:
            number = pb.LeaseReturn.FromString(packet).lease
        except DecodeError as error:
            raise InvalidRequest("packet", "not a LeaseReturn") from error
        if self._lease is None or number != self._lease.number:
            raise InvalidRequest("lease", "not the one of this connection")
        self._in_device_thread(self._take_back_whole)

    def _gone(self) -> None:
        """The connection has ended: the process has died, or everything is settled.

        Until its sequences are the server's again it counts as a holder, in the quotas too.
        """
        if self._has_ended:
            self._forget()
            return
        delay_s = SETTLE_S if self._lending.plane == pb.PLANE_CUDA else 0.0
        self._lending.loop.call_later(delay_s, self._in_device_thread, self._take_back, self._forget_soon)

    def _forget(self) -> None:
        self._lending.holders.discard(self)

    def _forget_soon(self) -> None:
        """The same, from any thread."""
        with suppress(RuntimeError):  # the loop may be closed by then
            self._lending.loop.call_soon_threadsafe(self._forget)

    def _take_back_whole(self) -> None:
        """Runs in the device thread, as what follows."""
        lender, lease = self._loaded.engine.lender, self._lease
        if lease is None or lease not in lender:
            return
        try:
            lender.take_back(lease, wire.found_states(lease.block))
        except Corrupt as error:
            trouble(_log, "lease given back in disorder", error, memory=self._loaded.id.name)
            lender.take_back(lease)

    def _take_back(self) -> None:
        lender, lease = self._loaded.engine.lender, self._lease
        if lease is not None and lease in lender:
            event(_log, logging.WARNING, "holder of a lease has gone", memory=self._loaded.id.name)
            lender.take_back(lease)

    def _recall(self, lease: int) -> None:
        if self._link is not None:
            self._link.send(pb.LeaseRecall(lease=lease).SerializeToString())

    def _ended(self) -> None:
        self._has_ended = True
        if self._link is not None:
            self._lending.loop.call_soon_threadsafe(self._link.close)

    def _in_device_thread(self, run: Callable[[], None], after: Callable[[], None] = _nothing) -> None:
        """Runs something there in the tenant's turn, then `after` whatever came of it; that alone if it is closed."""
        try:
            future = self._lending.registry.worker.control(run, behind=self._loaded.id.tenant)
        except MemstoreError as error:
            trouble(_log, "lease not settled", error)
            after()
            return
        future.add_done_callback(lambda _: after())
        future.add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            trouble(_log, "lease failed", error, memory=self._loaded.id.name)
            self._ended()


def plane_of(device: torch.device) -> pb.Plane.ValueType:
    """The plane on which memories of a device can be lent."""
    return pb.PLANE_CUDA if device.type == "cuda" else pb.PLANE_SHM


def describe(loaded: Loaded, lease: Lease) -> pb.MappedMemory:
    """A lease as its holder needs to know it."""
    engine = loaded.engine
    return pb.MappedMemory(
        plane=plane_of(engine.device),
        layout=LAYOUT,
        spec=wire.encode_spec(engine.spec),
        lease=lease.number,
        num_sequences=len(lease.names),
        slab_bytes=0 if engine.region is None else engine.region.content.numel(),
        block_bytes=lease.block.size_bytes,
        device=device_name(engine.device),
    )
