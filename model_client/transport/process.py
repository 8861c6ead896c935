"""ProcessTransport: the server's own service in this process. Tensors are handed over, not copied."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from model_client.errors import ClientClosed, Late, MemstoreClientError, from_class_name

if TYPE_CHECKING:
    import torch
    from google.protobuf.message import Message

    from memstore.embedded import Embedded
    from memstore.plane import ProcessPlane
    from memstore.v1 import memstore_pb2 as pb
    from model_client.transport.base import Standing

T = TypeVar("T")


class HandedPlane:
    """Tensors themselves, by number. The engine reads them where they are."""

    name = "process"
    is_single_use = True

    def __init__(self, plane: ProcessPlane) -> None:
        self._plane = plane

    def write(self, tensor: torch.Tensor, into: pb.Tensor) -> None:
        """Shares the tensor: it is left as it is until the call is answered."""
        into.Clear()  # what was handed over before, where a request is sent again
        self._plane.fill([into], [tensor])

    def read(self, message: pb.Tensor, device: torch.device) -> torch.Tensor:
        """The engine's own result, copied only where `device` is another one."""
        return self._plane.read(message, "reply").to(device)

    def discard(self, message: Message) -> None:
        """Lets go of what was handed over and not read."""
        self._plane.discard(message)


class ProcessTransport:
    """The service as the server runs it, with one device thread of its own. Begins at the first call."""

    name = "process"
    counted = ""

    def __init__(self, device: str) -> None:
        from memstore.embedded import Embedded  # the server's half; a client of a remote server does not load it

        self._embedded: Embedded = Embedded(device)
        self._is_closed = False
        self._process_id = os.getpid()
        self.plane = HandedPlane(self._embedded.plane)

    def call(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
        """Begins the call; the device thread answers it."""
        answer: Future[Message] = Future()
        if self._is_closed or self._process_id != os.getpid():
            answer.set_exception(ClientClosed("the client is closed, or was made in the parent of this process"))
            return answer
        self._embedded.call(method, request, timeout_s).add_done_callback(lambda done: hand_on(done, answer))
        return answer

    def stand(self, request: pb.StepRequest, timeout_s: float) -> Standing | None:
        """See StandingTransport."""
        if self._is_closed or self._process_id != os.getpid():
            return None
        return stood(self._embedded.stand(request, timeout_s), timeout_s)

    def close(self) -> None:
        """Ends the device thread and frees every memory."""
        if not self._is_closed and self._process_id == os.getpid():
            self._is_closed = True
            self._embedded.close()


def stood(made: Future[T], timeout_s: float) -> T:
    """What the engine made, waited for. Raises MemstoreClientError."""
    try:
        return made.result(timeout_s)
    except TimeoutError as error:
        raise Late("no answer before the deadline") from error
    except Exception as error:
        raise client_error(error) from error


def hand_on(done: Future[Message], answer: Future[Message]) -> None:
    """Gives an engine's outcome to the client's future."""
    error = done.exception()
    if error is None:
        answer.set_result(done.result())
    else:
        answer.set_exception(client_error(error))


def client_error(error: BaseException) -> MemstoreClientError:
    """The client's class of the same name, or its own error; the server's classes are not loaded for it."""
    if isinstance(error, MemstoreClientError):
        return error
    return from_class_name(
        type(error).__name__,
        str(error),
        getattr(error, "metadata", {}),
        getattr(error, "retry_delay_s", None),
    )
