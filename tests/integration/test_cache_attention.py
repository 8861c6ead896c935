"""CacheAttention, StateProjection and the context of earlier answers."""

from __future__ import annotations

import pytest
import torch
from models import slow_read

from model_client import cache_attention
from model_client.cache_attention import (
    CacheAttention,
    CacheAttentionSizes,
    RetrievedRows,
    StateProjection,
    join_context,
)

pytestmark = pytest.mark.usefixtures("each_device")

SIZES = CacheAttentionSizes(
    hidden_size=12, dim=6, num_heads=4, num_kv_heads=2, head_dim=5, context=2, window=2, null_slot=True
)


def _attention(sizes: CacheAttentionSizes = SIZES) -> CacheAttention:
    torch.manual_seed(0)
    attention = CacheAttention(sizes)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    return attention


def _retrieved(num_tokens: int = 7, num_rows: int = 9, hits: int = 3) -> RetrievedRows:
    torch.manual_seed(1)
    entries = torch.randint(-1, num_rows, (num_tokens, SIZES.context * hits * SIZES.window), dtype=torch.int32)
    entries[2] = -1
    return RetrievedRows(torch.randn(num_rows, SIZES.dim), entries, torch.randn(num_tokens, SIZES.dim))


@pytest.mark.parametrize("null_slot", [True, False])
def test_equals_loops_over_tokens_heads_and_entries(null_slot: bool) -> None:
    sizes = CacheAttentionSizes(12, 6, 4, 2, 5, 2, 2, null_slot)
    attention, retrieved, states = _attention(sizes), _retrieved(), torch.randn(7, 12)
    assert retrieved.queries is not None
    expected = [
        slow_read(attention, states[token], retrieved.queries[token], _slots(retrieved, token)) for token in range(7)
    ]
    torch.testing.assert_close(attention(states, retrieved), torch.stack(expected), rtol=1e-4, atol=1e-4)


def _slots(retrieved: RetrievedRows, token: int) -> list[torch.Tensor | None]:
    return [None if entry < 0 else retrieved.rows[entry] for entry in retrieved.entries[token].tolist()]


@pytest.mark.parametrize("null_slot", [True, False])
def test_a_token_without_entries_gets_zero_and_no_nan_even_backwards(null_slot: bool) -> None:
    attention = _attention(CacheAttentionSizes(12, 6, 4, 2, 5, 2, 2, null_slot))
    states = torch.randn(7, 12, requires_grad=True)
    retrieved = RetrievedRows(torch.zeros(0, 6, requires_grad=True), torch.full((7, 12), -1), None)
    output = attention(states, retrieved)
    assert torch.equal(output, torch.zeros(7, 12))
    output.sum().backward()
    gradients = [parameter.grad for parameter in attention.parameters() if parameter.grad is not None]
    assert states.grad is not None
    assert all(torch.isfinite(gradient).all() for gradient in [*gradients, states.grad])


def test_an_untrained_one_adds_nothing() -> None:
    output = CacheAttention(SIZES)(torch.randn(7, 12), _retrieved())
    assert torch.equal(output, torch.zeros(7, 12))


def test_chunks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, states = _attention(), torch.randn(7, 12)
    whole = attention(states, _retrieved())
    monkeypatch.setattr(cache_attention, "MAX_GATHERED", 2 * 12 * 6)
    torch.testing.assert_close(attention(states, _retrieved()), whole)


def test_mass_of_a_token_is_what_the_null_slot_left() -> None:
    output, mass = _attention().forward_with_mass(torch.randn(7, 12), _retrieved())
    assert output.shape == (7, 12)
    assert (mass[2] == 0).all()
    assert (mass[_retrieved().entries < 0] == 0).all()
    sums = mass.sum(dim=1)
    assert ((sums >= 0) & (sums < 1)).all()


def test_gradients_reach_rows_through_the_gather() -> None:
    attention = _attention()
    retrieved = _retrieved()
    retrieved.rows.requires_grad_()
    attention(torch.randn(7, 12), retrieved).sum().backward()
    read = set(retrieved.entries.flatten().tolist()) - {-1}
    assert retrieved.rows.grad is not None
    for row in range(len(retrieved.rows)):
        assert bool(retrieved.rows.grad[row].any()) == (row in read)


def test_projection_is_normalised_and_fitted_to_the_widest_directions() -> None:
    torch.manual_seed(0)
    projection = StateProjection(8, 3)
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    sample = torch.randn(500, 8) * torch.tensor([9.0, 7.0, 5.0, 0.1, 0.1, 0.1, 0.1, 0.1]) @ basis.T + 3.0
    projection.fit(sample)
    keys = projection(sample)
    torch.testing.assert_close(keys.mean(dim=1), torch.zeros(500), atol=1e-5, rtol=0)
    spanned = projection.linear.weight @ basis
    assert spanned[:, 3:].abs().max() < 0.05


@pytest.mark.parametrize("context", [1, 2, 4])
def test_calls_in_pieces_join_the_same_context_as_one_call(context: int) -> None:
    """Three sequences of 5, 0 and 3 tokens, in one call, or in calls of uneven pieces with the carry between."""
    torch.manual_seed(0)
    answers = {name: torch.randint(-1, 6, (count, 2, 2)) for name, count in (("a", 5), ("b", 0), ("c", 3))}
    rows, positions = torch.randn(6, 4), torch.arange(6) + 100
    whole = join_context(rows, positions, torch.cat(list(answers.values())), [5, 0, 3], context=context)
    read = {name: [] for name in answers}  # type: dict[str, list[torch.Tensor]]
    carry, taken = None, dict.fromkeys(answers, 0)
    for counts in ([2, 0, 0], [1, 0, 2], [0, 0, 1], [2, 0, 0]):
        pieces = []
        for name, count in zip(answers, counts, strict=True):
            pieces.append(answers[name][taken[name] : taken[name] + count])
            taken[name] += count
        part = join_context(rows, positions, torch.cat(pieces), counts, context=context, carry=carry)
        carry = part.carry
        contents = _contents(part.rows, part.positions, part.entries).split(counts)
        for name, content in zip(answers, contents, strict=True):
            read[name].append(content)
    expected = _contents(whole.rows, whole.positions, whole.entries).split([5, 0, 3])
    for name, content in zip(answers, expected, strict=True):
        torch.testing.assert_close(torch.cat(read[name]), content, equal_nan=True)


def _contents(rows: torch.Tensor, positions: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """(N, E, d + 1): the row and its position behind each entry, NaN for none."""
    table = torch.cat([torch.cat([rows, positions[:, None]], dim=1), torch.full((1, rows.shape[1] + 1), torch.nan)])
    return table[entries.long()]
