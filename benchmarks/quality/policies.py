"""Which row leaves when a memory is full: a reference cache with several policies. memstore itself has FIFO only.

It searches as memstore does (exact, L2, neighbours by position); `fifo` here and memstore give the same losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.network import Gathered, Network
from benchmarks.quality.ring import exact_top, widen

POLICIES = ("fifo", "random", "lru", "attention", "duplicates")
PROTECTED_RATIO = 0.25  # of the capacity: the newest rows, which attention and duplicates leave alone


class PolicyCache:
    """Keys of a batch of documents, at most `capacity` each; whichever has the least priority leaves.

    fifo: the oldest. random: any. lru: the one whose last hit, or arrival, is longest ago. attention: the one that got
    the least attention in all. duplicates: the one most similar to a newer one.
    """

    def __init__(self, policy: str, batch: int, capacity: int, dim: int, length: int, device: Any) -> None:
        self.policy, self.capacity, self.next = policy, capacity, 0
        self.keys = torch.zeros(batch, capacity, dim, device=device)
        self.positions = torch.full((batch, capacity), -1, dtype=torch.int64, device=device)
        self.merit = torch.full((batch, capacity), float("-inf"), device=device)
        self.slots = torch.full((batch, length + 128), -1, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.generator = torch.Generator(device).manual_seed(0)

    def search(self, keys: Tensor, top_k: int) -> Tensor:
        """(batch, T, k) slots."""
        bias = self.keys.square().sum(dim=-1).div(-2).masked_fill(self.positions < 0, float("-inf"))
        return exact_top(torch.baddbmm(bias[:, None], keys, self.keys.transpose(1, 2)), top_k)

    def neighbours(self, slots: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
        """Slots of the hits and of the rows around them, by position, and whether they are kept."""
        batch = len(slots)
        found = self.positions[self.rows, slots.flatten(1)].view(slots.shape)
        wanted = found[..., None] + torch.arange(-before, after + 1, device=slots.device)
        is_given = (found[..., None] >= 0) & (wanted >= 0)
        places = self.slots[self.rows, wanted.clamp_min(0).view(batch, -1)].view(wanted.shape)
        return places.clamp_min(0), is_given & (places >= 0)

    def credit(self, slots: Tensor, mass: Tensor) -> None:
        """Counts hits and attention: slots and mass (batch, n)."""
        if self.policy == "lru":
            self.merit.scatter_(1, slots, torch.full_like(mass, float(self.next)))
        if self.policy == "attention":
            self.merit.scatter_add_(1, slots, mass)

    def append(self, keys: Tensor) -> None:
        """Keys (batch, T, dim) take the places of the rows with the least priority."""
        batch, length, _ = keys.shape
        if self.policy == "duplicates":
            likeness = torch.bmm(keys, self.keys.transpose(1, 2)).amax(dim=1)
            self.merit = torch.where(self.positions < 0, self.merit, torch.minimum(self.merit, -likeness))
        places = self._priority().topk(length, dim=1, largest=False, sorted=False).indices
        left = self.positions.gather(1, places)
        self.slots[self.rows, torch.where(left < 0, self.slots.shape[1] - 1, left)] = -1
        positions = torch.arange(self.next, self.next + length, device=keys.device).expand(batch, -1)
        self.slots[self.rows, positions] = places
        self.positions[self.rows, places] = positions
        self.keys[self.rows, places] = keys
        self.merit[self.rows, places] = self._first_merit(positions)
        self.next += length

    def _first_merit(self, positions: Tensor) -> Tensor:
        if self.policy == "random":
            return torch.rand(positions.shape, device=positions.device, generator=self.generator)
        return (
            positions.float()
            if self.policy in ("fifo", "lru")
            else torch.zeros(positions.shape, device=positions.device)
        )

    def _priority(self) -> Tensor:
        merit = self.merit
        if self.policy in ("attention", "duplicates"):
            newest = self.positions >= self.next - int(PROTECTED_RATIO * self.capacity)
            merit = torch.where(newest, 1e9 + self.positions.float(), merit)
        return merit.masked_fill(self.positions < 0, float("-inf"))


class PolicyNetwork(Network):
    """A network whose memory is a PolicyCache of projected states."""

    cache: PolicyCache | None = None

    def _enter(self, number: int, hidden: Tensor) -> None:
        if number != self.config.retrieval_layer or self.cache is None:
            return
        config, batch, length = self.config, hidden.shape[0], hidden.shape[1]
        keys = self.weights.projection(hidden).half().float()
        slots, is_live = self.cache.neighbours(self.cache.search(keys, config.top_k), config.before, config.after)
        self._slots, self._is_live = slots.flatten(2), is_live.flatten(2)
        found = self.cache.keys[self.cache.rows, self._slots.flatten(1)].view(batch, length, -1, config.dim)
        found, is_live = widen(found, self._is_live, config.context)
        entries = torch.where(is_live, 0, -1).view(batch * length, -1)
        self._retrieved = Gathered(found.reshape(batch * length, -1, config.dim), entries, keys.flatten(0, 1))
        self._keys = keys

    def _reader(self, number: int) -> Any:
        attention = self.weights.cache_attention(number)

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._retrieved is None or self.cache is None:
                return None
            states = args[0] if args else kwargs["hidden_states"]
            added, mass = attention.forward_with_mass(states.flatten(0, 1), self._retrieved)
            if number == self.config.attention_layers[-1]:
                batch = states.shape[0]
                own = mass[:, : self._slots.shape[2]].reshape(batch, -1) * self._is_live.reshape(batch, -1)
                self.cache.credit(self._slots.flatten(1), own)
                self.cache.append(self._keys)
            return (output[0] + added.view(states.shape), *output[1:])

        return read
