"""Cache attention: how a decoder layer reads what its memory gave back. Pure torch, no transport.

Letters: N tokens of a step, U distinct retrieved rows, d row width, k hits a query, w neighbours a hit, c context,
E = c * k * w entries a token attends to, S sequences. Source: Neurocache, arXiv:2407.02486.

The retrieved rows enter every head through one matrix each, so the key projection is folded into the query and the
value projection into the result: a step gathers its (N, E, d) rows once, whatever the number of heads and layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_GATHERED = 1 << 26
"""Elements of the gathered rows that are held at once where no gradient is wanted; beyond it tokens go in chunks."""


class StateProjection(nn.Module):
    """Makes keys of hidden states: p = LayerNorm(W h + b), of width `dim`, without scale and shift of its own."""

    def __init__(self, hidden_size: int, dim: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, dim, dtype=dtype)
        nn.init.normal_(self.linear.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) of any floating dtype -> (..., dim) in the dtype of the weights, or of autocast."""
        projected = self.linear(hidden_states.to(self.linear.weight.dtype))
        return functional.layer_norm(projected, projected.shape[-1:])

    @torch.no_grad()
    def fit(self, hidden_states: torch.Tensor) -> None:
        """Sets the weights to the principal directions of a sample (..., hidden_size) of at least `dim` states."""
        sample = hidden_states.float().reshape(-1, hidden_states.shape[-1])
        mean = sample.mean(dim=0)
        covariance = (sample - mean).T @ (sample - mean)
        directions = torch.linalg.eigh(covariance).eigenvectors[:, -self.linear.out_features :].T.flip(0)
        self.linear.weight.copy_(directions)
        self.linear.bias.copy_(-(directions @ mean))


@dataclass(frozen=True, slots=True)
class CacheAttentionSizes:
    """The sizes of one cache attention; `context` and `window` are only needed for the bias of each slot."""

    hidden_size: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int = 1
    window: int = 1
    null_slot: bool = True


@dataclass(slots=True)
class RetrievedRows:
    """What the tokens of one step may attend to, shared by all cache attentions of that step.

    rows: (U, d) floating. entries: (N, E) int32 or int64 into the rows, -1 for a slot that is empty.
    queries: (N, d) keys of the tokens themselves, or None.
    """

    rows: torch.Tensor
    entries: torch.Tensor
    queries: torch.Tensor | None = None
    _gathered: torch.Tensor | None = field(default=None, repr=False)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Stretches of tokens with their gathered rows (n, E, d); all in one, and kept, unless they are too many."""
        num_tokens, num_entries = self.entries.shape
        per_token = max(1, num_entries * self.rows.shape[1])
        if self.rows.requires_grad or num_tokens * per_token <= MAX_GATHERED:
            if self._gathered is None or self._gathered.dtype != dtype:
                self._gathered = self._gather(self.entries, dtype)
            yield slice(0, num_tokens), self._gathered
            return
        length = max(1, MAX_GATHERED // per_token)
        for begin in range(0, num_tokens, length):
            part = slice(begin, min(begin + length, num_tokens))
            yield part, self._gather(self.entries[part], dtype)

    def _gather(self, entries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Row 0 stands for the empty slots; as the padding row it takes no part in the backward pass.
        padded = functional.pad(self.rows.to(dtype), (0, 0, 1, 0))
        return functional.embedding(entries + 1, padded, padding_idx=0)


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """The same, gathered beforehand. gathered: (N, E, d) floating, zero where `entries`, of its first axes, is -1."""

    gathered: torch.Tensor
    entries: torch.Tensor
    queries: torch.Tensor | None = None

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """All tokens at once."""
        yield slice(0, len(self.gathered)), self.gathered.to(dtype)


class CacheAttention(nn.Module):
    """Attention of a layer's tokens over retrieved rows, with projections of its own and no rotary embedding.

    Zero at the start (the output projection is zero). A learned logit of each head stands for "nothing of use here"
    if `null_slot`; a learned bias of each slot (context, window) tells a hit from its neighbours, and a learned
    factor of each head weighs how near a row is to the token's own key.
    """

    def __init__(self, sizes: CacheAttentionSizes, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        inner = sizes.num_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden_size, inner, dtype=dtype)
        self.k_proj = nn.Linear(sizes.dim, sizes.num_kv_heads * sizes.head_dim, bias=False, dtype=dtype)
        self.v_proj = nn.Linear(sizes.dim, sizes.num_kv_heads * sizes.head_dim, bias=False, dtype=dtype)
        self.o_proj = nn.Linear(inner, sizes.hidden_size, bias=False, dtype=dtype)
        self.similarity = nn.Parameter(torch.zeros(sizes.num_heads, dtype=dtype))
        self.slot_bias = nn.Parameter(torch.zeros(sizes.num_heads, sizes.context, sizes.window, dtype=dtype))
        self.null_logit = nn.Parameter(torch.zeros(sizes.num_heads, dtype=dtype)) if sizes.null_slot else None
        nn.init.normal_(self.q_proj.weight, std=sizes.hidden_size**-0.5)
        nn.init.zeros_(self.q_proj.bias)
        nn.init.normal_(self.k_proj.weight, std=sizes.dim**-0.5)
        nn.init.normal_(self.v_proj.weight, std=sizes.dim**-0.5)
        nn.init.zeros_(self.o_proj.weight)

    def forward(self, hidden_states: torch.Tensor, retrieved: RetrievedRows | GatheredRows) -> torch.Tensor:
        """What the memory adds to the attention's output: (N, hidden_size) -> (N, hidden_size), in the same dtype."""
        return self._attend(hidden_states, retrieved, None)

    def forward_with_mass(
        self, hidden_states: torch.Tensor, retrieved: RetrievedRows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the share of attention on each entry, averaged over the heads: (N, E) float32."""
        mass: list[torch.Tensor] = []
        output = self._attend(hidden_states, retrieved, mass)
        return output, torch.cat(mass)

    def _attend(
        self, hidden_states: torch.Tensor, retrieved: RetrievedRows | GatheredRows, mass: list[torch.Tensor] | None
    ) -> torch.Tensor:
        folded = self._fold_queries(hidden_states, retrieved.queries)
        read: list[torch.Tensor] = []
        for part, rows in retrieved.chunks(folded.dtype):
            shares = self._shares(torch.bmm(folded[part], rows.transpose(1, 2)), retrieved.entries[part])
            read.append(torch.bmm(shares.to(rows.dtype), rows))
            if mass is not None:
                mass.append(shares.float().mean(dim=1))
        return self._unfold(read[0] if len(read) == 1 else torch.cat(read)).to(hidden_states.dtype)

    def _fold_queries(self, hidden_states: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """(N, heads, d): each head's query carried through its key projection, scaled."""
        sizes = self.sizes
        queries = self.q_proj(hidden_states.to(self.q_proj.weight.dtype)) * sizes.head_dim**-0.5
        grouped = queries.view(len(queries), sizes.num_kv_heads, -1, sizes.head_dim).permute(1, 0, 2, 3)
        weights = self.k_proj.weight.view(sizes.num_kv_heads, sizes.head_dim, sizes.dim)
        folded = torch.bmm(grouped.reshape(sizes.num_kv_heads, -1, sizes.head_dim), weights)
        folded = folded.view(sizes.num_kv_heads, len(queries), -1, sizes.dim).permute(1, 0, 2, 3)
        folded = folded.reshape(len(queries), sizes.num_heads, sizes.dim)
        if keys is None:
            return folded
        factors = (self.similarity * sizes.dim**-0.5)[None, :, None]
        weighed: torch.Tensor = folded + (factors * keys.to(factors.dtype)[:, None, :]).to(folded.dtype)
        return weighed

    def _shares(self, logits: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """(n, heads, E) logits -> float32 shares; an empty slot gets none, and all are zero where all are empty."""
        empty = (entries < 0)[:, None, :]
        sizes = self.sizes
        hits = logits.shape[-1] // (sizes.context * sizes.window)
        bias = self.slot_bias[:, :, None, :].expand(-1, -1, hits, -1).reshape(1, sizes.num_heads, -1)
        logits = torch.where(empty, torch.finfo(torch.float32).min, logits.float() + bias.float())
        if self.null_logit is None:
            return torch.where(empty, 0.0, torch.softmax(logits, dim=-1))
        null = self.null_logit.float()[None, :, None].expand(len(logits), -1, 1)
        shares = torch.softmax(torch.cat([null, logits], dim=-1), dim=-1)[..., 1:]
        return torch.where(empty, 0.0, shares)

    def _unfold(self, read: torch.Tensor) -> torch.Tensor:
        """(N, heads, d) read rows -> (N, hidden_size), through the value and the output projection."""
        sizes = self.sizes
        grouped = read.view(len(read), sizes.num_kv_heads, -1, sizes.dim).permute(1, 0, 2, 3)
        weights = self.v_proj.weight.view(sizes.num_kv_heads, sizes.head_dim, sizes.dim).to(read.dtype)
        values = torch.bmm(grouped.reshape(sizes.num_kv_heads, -1, sizes.dim), weights.transpose(1, 2))
        values = values.view(sizes.num_kv_heads, len(read), -1, sizes.head_dim).permute(1, 0, 2, 3)
        output: torch.Tensor = self.o_proj(values.reshape(len(read), sizes.num_heads * sizes.head_dim))
        return output


@dataclass(frozen=True, slots=True)
class Carry:
    """The last answers of each sequence, for the first tokens of its next call.

    rows: (S * (c - 1) * k * w, d), with their positions. entries: (S, c - 1, k * w) into them, -1 where there is none.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    entries: torch.Tensor


@dataclass(frozen=True, slots=True)
class JoinedAnswers:
    """Answers widened by the context.

    rows: (U', d), those of the carry last, with their positions (U',). entries: (N, c * k * w), newest token's first,
    -1 where there is none. carry: for the next call; None where the context is 1.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    entries: torch.Tensor
    carry: Carry | None


def join_context(
    rows: torch.Tensor,
    positions: torch.Tensor,
    index: torch.Tensor,
    counts: Sequence[int],
    *,
    context: int,
    carry: Carry | None = None,
) -> JoinedAnswers:
    """Widens each token's answer by those of the `context - 1` tokens before it in its sequence.

    rows: (U, d), positions: (U,). index: (N, k, w) into them, -1 for none. counts: tokens of each of the S sequences,
    in order. Without a carry the first tokens of each sequence have fewer entries.
    """
    flat = index.reshape(len(index), -1)
    if context == 1:
        return JoinedAnswers(rows, positions, flat, None)
    tokens, heads, tails = _places(tuple(counts), context, index.device)
    extended = flat.new_full((len(flat) + len(counts) * (context - 1), flat.shape[1]), -1)
    extended[tokens] = flat
    if carry is not None:
        extended[heads] = torch.where(carry.entries < 0, carry.entries, carry.entries + len(rows)).to(flat.dtype)
        rows = torch.cat([rows, carry.rows.to(rows.dtype)])
        positions = torch.cat([positions, carry.positions])
    reach = torch.arange(context, device=index.device)
    entries = extended[tokens[:, None] - reach].reshape(len(flat), -1)
    return JoinedAnswers(rows, positions, entries, _next_carry(rows, positions, extended[tails]))


def _next_carry(rows: torch.Tensor, positions: torch.Tensor, last: torch.Tensor) -> Carry:
    """last: (S, c - 1, k * w) into the rows."""
    chosen = (last.reshape(-1) + 1).long()
    kept = functional.pad(rows.detach(), (0, 0, 1, 0))[chosen]
    kept_positions = functional.pad(positions, (1, 0), value=-1)[chosen]
    numbers = torch.arange(last.numel(), device=last.device, dtype=last.dtype).view(last.shape)
    return Carry(kept, kept_positions, torch.where(last < 0, last, numbers))


@lru_cache(maxsize=64)
def _places(
    counts: tuple[int, ...], context: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the tokens (N,), the carried answers (S, c - 1) and the last answers (S, c - 1) lie in the extended map.

    The block of each sequence is its carried answers, then its tokens.
    """
    before = context - 1
    with torch.inference_mode(mode=False):
        lengths = torch.tensor(counts, dtype=torch.long)
        ends = torch.cumsum(lengths + before, dim=0)
        begins = ends - lengths - before
        offsets = torch.arange(before)
        sequence = torch.repeat_interleave(torch.arange(len(counts)), lengths)
        tokens = torch.arange(sum(counts)) + (sequence + 1) * before
        heads = begins[:, None] + offsets
        tails = ends[:, None] - before + offsets
        return tokens.to(device), heads.to(device), tails.to(device)
