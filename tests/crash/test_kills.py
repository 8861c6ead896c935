"""A server is killed at every point of its files, and its client counts what is gone, and what is there twice."""

from __future__ import annotations

import os
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.crash.history import lives
from tests.crash.killing import POINTS

if TYPE_CHECKING:
    from pathlib import Path

KILLS = int(os.environ.get("KILLS", str(len(POINTS))))
SEED = int(os.environ.get("KILL_SEED", "0"))


@pytest.mark.timeout(60 + 10 * KILLS)
def test_no_kill_takes_or_doubles_a_row_that_was_acknowledged(tmp_path: Path) -> None:
    tally = lives(tmp_path, Random(SEED), KILLS)
    assert (tally.kills, tally.lost, tally.duplicates) == (KILLS, 0, 0), f"seed {SEED}: {tally}"
    assert tally.acknowledged > 10 * KILLS
    assert tally.points == set(POINTS[:KILLS])
