"""Transport: how a request reaches the servicer, and the plane its tensors travel on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
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
