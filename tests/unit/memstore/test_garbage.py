"""Garbage: what a process that has settled looks through, and that nothing is collected while somebody puts it off."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap

import pytest

from memstore import garbage

SETTLED = """
    import gc
    import weakref
    from memstore import garbage

    class Circle:
        def __init__(self):
            self.itself = self

    before = weakref.ref(Circle())
    garbage.settle()
    known, circle = len(gc.get_objects()), weakref.ref(Circle())
    gc.collect()
    print(before() is None, circle() is None, known < 1000 < gc.get_freeze_count())
"""


def test_a_process_that_has_settled_looks_through_what_came_since_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SETTLED)], capture_output=True, timeout=60, check=True, text=True
    )
    assert done.stdout.split() == ["True", "True", "True"], done.stderr


def test_it_is_put_off_until_the_last_one_has_done() -> None:
    first, second = garbage.put_off(), garbage.put_off()
    first.__enter__()
    second.__enter__()
    assert not gc.isenabled()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_it_goes_on_after_a_failure() -> None:
    with pytest.raises(ValueError, match="spoilt"), garbage.put_off():
        assert not gc.isenabled()
        raise ValueError("spoilt")
    assert gc.isenabled()


def test_who_collects_none_at_all_is_left_to_that() -> None:
    gc.disable()
    try:
        with garbage.put_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
