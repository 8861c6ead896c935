"""Transport: how a request reaches the servicer, and the plane its tensors travel on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    import torch
    from google.protobuf.message import Message

    from memstore.v1 import memstore_pb2 as pb


class TensorPlane(Protocol):
    """Turns tensors into what stands for them in a message, and back."""

    @property
    def name(self) -> str:
        """ "inline", "process", "shm" or "cuda": how tensors travel now."""
        ...

    @property
    def is_single_use(self) -> bool:
        """True where a written tensor can be read once only, so that a request sent again must be written again."""
        ...

    def write(self, tensor: torch.Tensor, into: pb.Tensor) -> None:
        """Makes `into` stand for `tensor`: any device, any strides; left as it is until the call is answered."""
        ...

    def read(self, message: pb.Tensor, device: torch.device) -> torch.Tensor:
        """The tensor that `message` stands for, on `device`, the caller's own. Raises Internal if malformed."""
        ...

    def discard(self, message: Message) -> None:
        """Lets go of the tensors of a message that nobody will read."""
        ...


class Transport(Protocol):
    """Carries calls to one servicer. Safe from any thread.

    Calls may be answered in any order. A call is sent at most once: whatever is tried again is tried by the caller.
    """

    @property
    def name(self) -> str:
        """ "process", "grpc" or "grpc-stream"."""
        ...

    @property
    def plane(self) -> TensorPlane:
        """How its tensors travel."""
        ...

    def call(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
        """Begins the call of this name in the contract, such as "Step", and never blocks or raises.

        The future gives the reply, or fails with a MemstoreClientError: Unavailable where the connection failed,
        ClientClosed once `close` was called. It may stay without an outcome once `timeout_s` is over.
        """
        ...

    def close(self) -> None:
        """Ends every thread and connection; calls under way fail. May be called again."""
        ...


class Standing(Protocol):
    """A retrieval that is run again and again, by the caller's own thread, on memory of this process.

    queries: (L, N, dim), filled before it is launched. index: (L, N, k, w) int32 into the rows, -1 for none.
    positions: (U,) int64. arrays: name -> (U, ...). The tensors stay where they are, so that launches can be captured
    into a CUDA graph; of the U rows there is room for, the first ones are in use.
    """

    queries: torch.Tensor
    index: torch.Tensor
    positions: torch.Tensor
    arrays: Mapping[str, torch.Tensor]
    launch: Callable[[], None]
    """Retrieves for `queries`, behind what the current stream has to do before it."""
    leave: Callable[[], None]
    """Ends a run of which everything has been queued."""

    def enter(self, timeout_s: float) -> bool:
        """Begins a run, on the current stream; False where it cannot be run, now or any more."""
        ...


@runtime_checkable
class StandingTransport(Protocol):
    """A transport whose engine is in this process, or may come to be."""

    @property
    def counted(self) -> str:
        """The counter of the steps that are done here, beside `calls`; "" for none."""
        ...

    def stand(self, request: pb.StepRequest, timeout_s: float) -> Standing | None:
        """A step that only retrieves, to be run by the caller; None where that cannot be, now or ever.

        Waits for the engine, until the timeout. Raises MemstoreClientError.
        """
        ...
