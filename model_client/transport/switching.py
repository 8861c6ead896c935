"""SwitchingPlane: tensors as they are while the engine is in this process, bytes in messages before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    import torch
    from google.protobuf.message import Message

    from memstore.plane import MixedPlane
    from model_client.transport.base import TensorPlane


class SwitchingPlane:
    """See TensorPlane. What was written before a switch can still be read and sent after it."""

    is_single_use = True

    def __init__(self, inline: TensorPlane) -> None:
        self.name = inline.name
        self._inline = inline
        self._handed: MixedPlane | None = None

    def engine_plane(self) -> MixedPlane:
        """The other end, for an engine of this process; the same for all of them, so that none loses a tensor."""
        if self._handed is None:
            from memstore.plane import MixedPlane

            self._handed = MixedPlane()
        return self._handed

    def switch(self, name: str | None) -> None:
        """From now on tensors are handed over, on the plane of this name; or carried, if None."""
        self.name = name or self._inline.name

    def write(self, tensor: torch.Tensor, into: pb.Tensor) -> None:
        """Shares the tensor, or copies it."""
        if self._handed is None or self.name == self._inline.name:
            self._inline.write(tensor, into)
        else:
            into.Clear()
            self._handed.fill([into], [tensor])

    def read(self, message: pb.Tensor, device: torch.device) -> torch.Tensor:
        """However it travelled."""
        if self._handed is None or message.region.plane != pb.PLANE_PROCESS:
            return self._inline.read(message, device)
        return self._handed.read(message, "reply").to(device)

    def discard(self, message: Message) -> None:
        """Lets go of what has come and was not read."""
        self._inline.discard(message)
        if self._handed is not None:
            self._handed.discard(message)

    def make_inline(self, request: Message) -> None:
        """Has a request that was written before the lease ended carry its tensors itself."""
        if self._handed is None:
            return
        from memstore.plane import tensors_of

        for tensor in tensors_of(request):
            if tensor.HasField("region"):
                handed = self._handed.read(tensor, "request")
                tensor.Clear()
                self._inline.write(handed, tensor)
