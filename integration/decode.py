"""DecodeLoop: passes of one token a sequence, one after the other, whose memory is read by a few CUDA graphs.

Launching the kernels of a retrieval and of cache attention one by one takes a model that decodes longer than they do.
Here they are two kinds of graphs on tensors that stay where they are: one that projects, retrieves and puts what was
found in front of what earlier tokens found, on a stream of its own, beside the layers between; and one a cache
attention. Nothing waits on the host.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from integration.held import RowBatch
from integration.recorded import Recorder
from model_client.cache_attention import Carry, GatheredRows

if TYPE_CHECKING:
    from integration.config import MemoryConfig
    from integration.weights import MemoryWeights
    from model_client.standing import StandingStep

RECORD_S = 1.0
"""How long the making of a loop waits for an engine that is at work."""

ENTER_S = 0.05
"""How long a pass does, before it takes the longer way."""


class EngineAtWork(RuntimeError):
    """The engine has left, or was at work for too long."""


class DecodeLoop:
    """See above. Its passes are those of the same sequences; for one thread.

    num_kept: rows of each sequence that wait here. num_passes: since it was entered. lives: False once a pass could not
    be begun. `start` begins a pass, `read` comes once for each layer of it.
    """

    def __init__(
        self, weights: MemoryWeights, config: MemoryConfig, standing: StandingStep, states: torch.Tensor, keeps: bool
    ) -> None:
        """states: (S, 1, hidden_size), as those of the passes. keeps: whether the rows of the passes are kept.

        Raises EngineAtWork; torch.AcceleratorError, RuntimeError where a GPU cannot take it.
        """
        self.num_kept = 0
        self.num_passes = 0
        self.num_sequences = len(states)
        self.keeps = keeps
        self.lives = True
        self._weights = weights
        self._standing = standing
        self._enter_s = min(ENTER_S, config.deadline_s)
        self._alive = [parameter.data for parameter in weights.parameters()]  # what the graphs read
        with torch.inference_mode(mode=False), torch.no_grad():
            self._make_tensors(config, states)
            self._recorder = Recorder(states.device)
            self._stream = self._recorder.stream
            self._begun, self._done = self._recorder.event(), self._recorder.event()
            self._is_read = True
            with self._recorder.at_work():
                if not standing.enter(min(RECORD_S, config.deadline_s)):
                    raise EngineAtWork
                try:
                    self._search = self._recorder.record(self._look_up)
                    self._readers = {
                        layer: self._recorder.record(partial(self._attend, layer)) for layer in config.attention_layers
                    }
                finally:
                    standing.leave()

    @property
    def is_current(self) -> bool:
        """Whether the weights lie where they lay."""
        now = [parameter.data_ptr() for parameter in self._weights.parameters()]
        return now == [parameter.data_ptr() for parameter in self._alive]

    @torch.no_grad()
    def enter(self, carry: Carry | None) -> None:
        """What the next pass comes after: what the tokens before it found."""
        self.num_kept = self.num_passes = 0
        self._join()
        self._cursor.zero_()
        self._entries.fill_(-1)
        before = self._rows.shape[1] - 1
        if carry is None or not before:
            return
        entries = carry.entries.flip(1)  # which has the newest last
        is_there, chosen = entries >= 0, entries.clamp(min=0).long()
        self._rows[:, :before] = torch.where(is_there[..., None], carry.rows[chosen], 0).to(self._rows.dtype)
        self._entries[:, :before] = entries.to(self._entries.dtype)
        self._positions[:, :before] = torch.where(is_there, carry.positions[chosen], -1)

    def carry(self, before_last: bool = False) -> Carry | None:
        """What the tokens after the passes come after; before_last: had the last pass not been."""
        num_answers = self._rows.shape[1] - 1
        if not num_answers:
            return None
        part = slice(1, None) if before_last else slice(0, num_answers)
        entries = self._entries[:, part].flip(1)
        numbers = torch.arange(entries.numel(), device=entries.device, dtype=entries.dtype).view(entries.shape)
        return Carry(
            self._rows[:, part].flip(1).flatten(0, 2),
            self._positions[:, part].flip(1).flatten(),
            torch.where(entries < 0, -1, numbers),
        )

    def take_kept(self) -> RowBatch | None:
        """The rows that wait here, as they are appended; None where there are none."""
        self._standing.count()
        self._join()
        number, self.num_kept = self.num_kept, 0
        if not number:
            return None
        rows = self._kept[:number].transpose(0, 1).flatten(0, 1).clone()
        self._cursor.zero_()
        return RowBatch(rows, None, (number,) * self.num_sequences)

    def start(self, states: torch.Tensor) -> bool:
        """Begins a pass with what enters the retrieval layer, (S, 1, hidden_size); False where the engine cannot.

        Few calls: each costs the model more than it seems, as its own code has left the caches of the processor.
        """
        if not self._is_read:  # the pass before was broken off
            self._join()
        self._hidden.copy_(states)
        stream, begun, done = self._stream, self._begun, self._done
        if stream is None or begun is None or done is None:
            self.lives = self._run()
        else:
            device, model_stream = torch.cuda.current_device(), torch.cuda.current_stream(stream.device_index)
            begun.record(model_stream)
            torch.cuda.set_stream(stream)
            try:
                stream.wait_event(begun)
                self.lives = self._run()
                done.record(stream)
            finally:
                torch.cuda.set_stream(model_stream)  # which makes its device the current one
                if device != stream.device_index:
                    torch.cuda.set_device(device)
            self._is_read = False
        if self.lives:
            self.num_passes += 1
            self.num_kept += self.keeps
        return self.lives

    def read(self, layer: int, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """An attention's output with what its layer reads: (S, 1, hidden_size) of the same dtype, both."""
        if not self._is_read:
            self._join()
        self._states.copy_(states)
        self._readers[layer]()
        return output + self._added

    def close(self) -> None:
        """Waits for what the GPU still does here; nothing may be called afterwards."""
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.current_stream(self._stream.device).synchronize()

    def _join(self) -> None:
        """Has the model's stream wait for what the last pass has looked up."""
        self._is_read = True
        if self._stream is not None and self._done is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)

    def _run(self) -> bool:
        if not self._standing.enter(self._enter_s):
            return False
        try:
            self._search()
        finally:
            self._standing.leave()
        return True

    def _make_tensors(self, config: MemoryConfig, states: torch.Tensor) -> None:
        """hidden, states, added: (S, 1, hidden_size). rows, entries, positions: newest first, of `context` tokens."""
        num_sequences, entries = len(states), config.top_k * config.window
        made = partial(torch.zeros, device=states.device)
        self._hidden, self._states, self._added = (made(states.shape, dtype=states.dtype) for _ in range(3))
        self._keys = made((num_sequences, config.dim), dtype=self._standing.queries.dtype)
        self._nothing = torch.zeros_like(self._keys)
        rows = self._standing.rows["key"]
        answers = (num_sequences, config.context, entries)
        self._rows = made((*answers, config.dim), dtype=rows.dtype)
        self._entries = torch.full(answers, -1, dtype=torch.int32, device=states.device)
        self._positions = torch.full(answers, -1, dtype=torch.int64, device=states.device)
        room = config.segment_length if self.keeps else 1
        self._kept = made((room, num_sequences, config.dim), dtype=self._keys.dtype)
        self._cursor = made(1, dtype=torch.int64)

    def _look_up(self) -> None:
        """Retrieves, and puts what was found first. A key that is no number finds nothing.

        All that is done are kernels: with copies or fills of memory among them, a graph takes many times as long to
        launch.
        """
        keys = self._weights.projection(self._hidden.flatten(0, 1))
        is_number = torch.isfinite(keys).all(dim=-1, keepdim=True)
        _put(self._keys, keys)
        torch.where(is_number, keys, self._nothing, out=self._standing.queries[0])
        self._standing.launch()
        found = torch.where(is_number, self._standing.index[0].flatten(1), -1)
        is_there, chosen = found >= 0, found.clamp(min=0).flatten()
        if self._rows.shape[1] > 1:
            for tensor in (self._rows, self._entries, self._positions):
                _put(tensor[:, 1:], tensor[:, :-1] * 1)
        rows = self._standing.rows["key"].index_select(0, chosen).view(self._rows[:, 0].shape)
        _put(self._rows[:, 0], torch.where(is_there[..., None], rows, 0))
        _put(self._entries[:, 0], found)
        positions = self._standing.positions.index_select(0, chosen).view(found.shape)
        _put(self._positions[:, 0], torch.where(is_there, positions, -1))
        if self.keeps:
            self._kept.index_copy_(0, self._cursor, self._keys[None])
            self._cursor.add_(1).clamp_(max=len(self._kept) - 1)

    def _attend(self, layer: int) -> None:
        retrieved = GatheredRows(self._rows.flatten(1, 2), self._entries.flatten(1), self._keys)
        added = self._weights.cache_attention(layer)(self._states.flatten(0, 1), retrieved)
        _put(self._added[:, 0], added)


def _put(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies by a kernel, which `copy_` does not do where both lie in one piece."""
    torch.mul(source, 1, out=target)
