"""Standing: a retrieval that its asker runs without the device's thread, whenever that is at rest.

A step of a decode loop asks for the same again, of the same sequences: nothing of it has to be decoded, checked,
planned and handed from thread to thread anew, and on a GPU its kernels can be part of the asker's own CUDA graphs. The
thread of the device stays the only one that changes anything; who reads beside it has the device to itself meanwhile.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from memstore.errors import MemstoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.repeated import Repeated

CLOSED, NEVER = -1, -2


class Guests:
    """Those who read a device without its thread: between two of its turns, one at a time.

    turn: number of the turns that were begun; as long as it stays the same, so does everything on the device; CLOSED
    once there will be none. rest: keeps the device at rest, and for oneself, as `acquire` of a lock does. release: ends
    a rest, or a turn.
    """

    def __init__(self) -> None:
        self.turn = 0
        self._at_rest = threading.Lock()
        self.rest, self.release = self._at_rest.acquire, self._at_rest.release
        self._readers: WeakSet[Standing] = WeakSet()

    def begin_turn(self) -> None:
        """The device's thread begins to work; what it does on a GPU comes behind what was read."""
        self._at_rest.acquire()
        self.turn += 1
        if self._readers:
            try:
                for reader in tuple(self._readers):
                    reader.let_pass()
            except BaseException:
                self.release()
                raise

    def add(self, reader: Standing) -> None:
        """In the thread of the device: this one may come from now on."""
        self._readers.add(reader)

    def close(self) -> None:
        """Nobody enters any more, and what was begun has been done."""
        with self._at_rest:
            self.turn = CLOSED
            for reader in tuple(self._readers):
                reader.join()


class Standing:
    """See above. For one thread; made in that of the device, `enter` and `leave` called by another one.

    queries: (L, N, dim), to be filled before the kernels run. index, positions, arrays: see Steady.
    launch: retrieves for them, between `enter` and `leave`; on a GPU it may be captured, and replayed. leave: all of
    the run has been queued on the GPU, or done.
    """

    def __init__(self, guests: Guests, repeated: Repeated, is_held: Callable[[], bool] | None) -> None:
        """is_held: False once the memory is another process's again; None where it never is. Compiles what is needed.

        Raises what `Repeated.follow` does.
        """
        self.queries, self.index = repeated.steady.queries, repeated.steady.index
        self.positions, self.arrays = repeated.steady.positions, repeated.steady.arrays
        self.launch = repeated.launch
        self.leave = guests.release
        self._guests = guests
        self._repeated = repeated
        self._is_held = is_held
        self._turn = NEVER
        self._stream: torch.cuda.Stream | None = None
        self._worker_stream: torch.cuda.Stream | None = None
        repeated.follow()
        repeated.launch()
        if self.queries.is_cuda:
            self._worker_stream = torch.cuda.current_stream(self.queries.device)
            self._worker_stream.synchronize()
        guests.add(self)

    def enter(self, timeout_s: float) -> bool:
        """Begins a run: what the memory holds now is what will be seen. False where it cannot be run, now or any more.

        On a GPU the caller's current stream is that of the run. After True, `leave` must follow.
        """
        guests = self._guests
        if not guests.rest(False) and not guests.rest(True, timeout_s):
            return False
        if self._turn == guests.turn and (self._is_held is None or self._is_held()):
            return True
        is_able = False
        try:
            is_able = self._follow()
        finally:
            if not is_able:
                self.leave()
        return is_able

    def let_pass(self) -> None:
        """Has the current stream, another one, wait for what was read."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def join(self) -> None:
        """Waits for what was read."""
        if self._stream is not None:
            self._stream.synchronize()

    def _follow(self) -> bool:
        """Takes over what has changed on the device since the last run."""
        if self._guests.turn == CLOSED or not (self._is_held is None or self._is_held()):
            return False
        if self._worker_stream is not None:
            self._stream = torch.cuda.current_stream(self.queries.device)
            self._stream.wait_stream(self._worker_stream)
        try:
            is_able = self._repeated.follow()
        except MemstoreError:
            return False
        self._turn = self._guests.turn if is_able else NEVER
        return is_able
