"""Which forward a layer runs again for."""

from __future__ import annotations

import gc

import pytest
import torch

from integration.forward import Forward
from integration.layout import TokenLayout
from integration.recomputing import PendingForwards


def given() -> dict[str, object]:
    """What an attention is given."""
    return {"hidden_states": torch.zeros(1), "position_embeddings": (torch.ones(1),), "use_cache": False}


def pending(forwards: PendingForwards, marks: dict[str, object]) -> tuple[Forward, torch.Tensor]:
    """A forward that is marked so, and its output."""
    layout = TokenLayout.of(1, 1, None)
    forward = Forward(layout=layout, is_cached=False, is_fresh=True, is_training=True, recomputes=True)
    forward.mark(marks)
    output = torch.ones(1, requires_grad=True) * 2
    forwards.add(forward, (output,))
    return forward, output


def test_the_same_objects_are_given_again() -> None:
    forwards, first, second = PendingForwards(), given(), given()
    kept = [pending(forwards, first), pending(forwards, second)]
    assert forwards.find(first | {"hidden_states": torch.ones(1)}) is kept[0][0]
    assert forwards.find(second) is kept[1][0]


def test_what_cannot_be_told_apart_is_refused() -> None:
    forwards, both = PendingForwards(), given()
    kept = [pending(forwards, both), pending(forwards, both)]
    for arguments in (both, given()):
        with pytest.raises(LookupError, match="several forwards"):
            forwards.find(arguments)
    assert len(kept) == 2


def test_one_alone_needs_no_telling() -> None:
    forwards = PendingForwards()
    assert forwards.find(given()) is None
    forward, output = pending(forwards, given())
    assert forwards.find(given()) is forward
    assert output.requires_grad


def test_a_forward_goes_with_the_graph_of_its_output() -> None:
    forwards = PendingForwards()
    loss = pending(forwards, given())[1].sum()
    gc.collect()
    assert forwards.find(given()) is not None
    loss.backward()
    del loss
    gc.collect()
    assert forwards.find(given()) is None


def test_without_a_gradient_nothing_is_kept() -> None:
    forwards = PendingForwards()
    with torch.no_grad():
        kept = pending(forwards, given())
    forwards.add(kept[0], None)
    assert forwards.find(given()) is None
