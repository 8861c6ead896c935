"""What the tests of leases share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from model_client.transport import mapped
from tests.serving import Setting, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serving import Serving


@pytest.fixture
def asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is asked for again at once."""
    monkeypatch.setattr(mapped, "FIRST_RETRY_S", 0.0)


@pytest.fixture
def server() -> Iterator[Serving]:
    """One that lends; a module with another has a fixture of its own."""
    with serving(Setting(lends=True)) as running:
        yield running
