"""Compiled search on the host: against float64 over shapes that the contract tests do not have, and how it is kept."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memstore.host import compiling, placing, planning
from memstore.host.helpers import Helpers
from memstore.host.job import HEADER, NEXT, NUM_CUT
from memstore.host.lowering import draw
from memstore.host.retriever import HostRetriever
from memstore.host.windows import sort
from memstore.index import INDEXES
from memstore.index.staged import staged_retrieve
from memstore.slab import Slab
from memstore.types import KEY, FirstPass, IndexKind, MemorySpec, Metric, PayloadSpec, RetrieveOptions
from tests.contract.test_index import DTYPES, asked, check, filled

if TYPE_CHECKING:
    from pathlib import Path

HOST = torch.device("cpu")


@pytest.fixture
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads, whatever the size, and pieces of a few rows."""
    monkeypatch.setattr(planning, "WORTH_A_HELPER", 0)
    monkeypatch.setattr(planning, "SMALLEST_READ", 1 << 12)
    monkeypatch.setattr(planning, "LARGEST_READ", 1 << 12)
    monkeypatch.setattr(planning, "FEWEST_MULTIPLIED", 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.mark.usefixtures("in_small_pieces")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(list(Metric)),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 3, 16, 31, 64, 100, 257, 1000]),
    st.integers(1, 300),
    st.integers(1, 1024),
    st.lists(st.sampled_from([0, 1, 2, 8, 9, 40]), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_any_shape(
    metric: Metric, dtype: torch.dtype, dim: int, capacity: int, top_k: int, counts: list[int], random: Any
) -> None:
    slab = filled(
        HOST,
        torch.randn(2, 4 * capacity, dim),
        dim=dim,
        capacity=capacity,
        max_sequences=4,
        metric=metric,
        dtype=dtype,
    )
    seen = []
    for _ in counts:
        end = random.randint(0, 3 * capacity)
        seen.append((random.randint(max(end - capacity, 0), end), end))
    places = random.sample(range(4), len(counts))
    check(slab, asked(slab, counts, seen, top_k=top_k, places=places), HostRetriever())


@pytest.mark.parametrize("dim", [64, 384, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows(dim: int, dtype: torch.dtype) -> None:
    slab = filled(HOST, torch.randn(1, 2 * 90, dim), dim=dim, capacity=90, max_sequences=2, num_layers=1, dtype=dtype)
    check(slab, asked(slab, (1, 12), ((100, 190), (3, 80)), layers=(0,)), HostRetriever())


@pytest.mark.parametrize(("capacity", "alignment"), [(3, 64), (20_000, 2 << 20)])
def test_rows_begin_with_a_cache_line_or_a_huge_page(capacity: int, alignment: int) -> None:
    spec = MemorySpec(name="m", dim=100, capacity=capacity, dtype=torch.float16)
    slabs = [Slab(spec, HOST) for _ in range(3)]
    assert not any(slab.keys.data_ptr() % alignment for slab in slabs)


@pytest.mark.parametrize("most_bytes", [1, 30_000, 1 << 30])
def test_candidates_that_take_too_much_are_looked_for_one_after_the_other(
    most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LIST_BYTES", most_bytes)
    slab = filled(HOST)
    batch = asked(slab, (1, 20, 0, 3, 9), ((1000, 1700), (0, 600), (0, 3), (0, 0), (5, 700)))
    check(slab, batch, HostRetriever())
    rows = HostRetriever()._view(slab).rows
    num_jobs = len(planning.plan(planning.Shape.of(batch), rows, slab.dim, 1).headers)
    assert num_jobs == {1: 8, 30_000: 2, 1 << 30: 1}[most_bytes]


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("window", [(0, 0), (0, 1), (2, 3)])
def test_a_retrieval_in_one_go_is_what_the_stages_give(metric: Metric, window: tuple[int, int]) -> None:
    slab = filled(HOST, metric=metric)
    slab.payloads = {"flag": torch.randint(2, (2, 5, 700)).bool(), "v": torch.randn(2, 5, 700, 3, 2).bfloat16()}
    batch = asked(slab, (3, 0, 12, 1), ((1000, 1700), (0, 5), (5, 300), (0, 0)), places=(2, 0, 4, 1), top_k=7)
    options = RetrieveOptions(top_k=7, window_before=window[0], window_after=window[1], arrays=(KEY, "flag", "v"))
    groups = np.array([[0, 5, 1, 4], [2, 3, 7, 6]])
    index = HostRetriever()
    once, staged = index.retrieve(slab, batch, options, groups), staged_retrieve(index, slab, batch, options, groups)  # type: ignore[arg-type]
    for name in ("row_splits", "positions", "index", "scores"):
        assert torch.equal(getattr(once, name), getattr(staged, name)), name
    for name, array in once.arrays.items():
        assert torch.equal(array, staged.arrays[name])
        assert array.dtype == staged.arrays[name].dtype


@given(st.lists(st.integers(0, 50)))
def test_sorting(values: list[int]) -> None:
    array = np.array(values, np.int32)
    sort(array)
    assert array.tolist() == sorted(values)


@compiling.kernel
def draw_next(header: Any) -> int:
    """Takes a piece."""
    return draw(header, NEXT)


@pytest.mark.usefixtures("in_small_pieces")
def test_a_helper_that_is_held_up_with_a_piece_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, drawn = threading.Event(), []
    ask = Helpers.tell

    def take_and_wait(help_with: Any, _: Any) -> None:
        integers = help_with.__self__.integers
        number = draw_next(integers[:HEADER])
        if number < integers[NUM_CUT]:
            drawn.append(number)
            may_go_on.wait()

    draw_next(np.zeros(HEADER, np.int64))
    monkeypatch.setattr(Helpers, "tell", lambda self, num, *call: ask(self, num, take_and_wait, *call))
    monkeypatch.setattr(planning, "PATIENCE", 0)
    slab = filled(HOST)
    for _ in range(200):
        check(slab, asked(slab, (1, 3), ((1000, 1700), (0, 600))), HostRetriever())
        if drawn:
            break
    may_go_on.set()
    assert drawn


FORKED = """
import os, sys, torch
from memstore.host import planning, retriever
from memstore.host.warming import warm
from tests.contract.test_index import asked, filled
warm()  # a helper that reads compiled code holds a lock, which would stay held in the child
planning.WORTH_A_HELPER = 0
torch.get_num_threads = lambda: 3
slab = filled(torch.device("cpu"))
batch = asked(slab, (1, 3), ((1000, 1700), (0, 600)))
host = retriever.HostRetriever()
before = host.search(slab, batch)
child = os.fork()
after = host.search(slab, batch)
is_same = all(torch.equal(*pair) for pair in zip(before, after))
num_helpers = len(host._helpers._helpers)
if child == 0:
    os._exit(0 if is_same and num_helpers == 2 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not is_same)
"""


def test_a_forked_process_searches_with_helpers_of_its_own() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    subprocess.run(command, check=True, timeout=150)


def test_helpers_end_with_their_owner() -> None:
    before = threading.active_count()
    helpers, is_done = Helpers(), threading.Event()
    for bell in helpers.tell(2, is_done.set):
        os.write(bell, np.ones(1, np.int64).tobytes())
    assert is_done.wait(10)
    threads = [thread for thread in threading.enumerate() if thread.name == "memstore-search"]
    assert len(threads) >= 2
    del helpers
    for thread in threads[-2:]:
        thread.join(10)
    assert threading.active_count() == before


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installed package of another folder, and a user of another home."""
    made = tmp_path / "host"
    made.mkdir()
    (made / "a.py").write_text("one")
    monkeypatch.setattr(compiling, "SOURCES", made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compiling, "folder", compiling.folder.__wrapped__)
    return made


def twice(number: int) -> int:
    return number + number


def test_code_is_kept_and_read(sources: Path) -> None:
    first, second = compiling.kernel(twice), compiling.kernel(twice)
    assert first(4) == second(4) == 8
    assert sum(first.stats.cache_misses.values()) == 1
    assert sum(second.stats.cache_hits.values()) == 1
    assert any((sources / "__pycache__").rglob("*.nbc"))


def test_code_of_other_sources_is_not_read(sources: Path) -> None:
    compiling.kernel(twice)(4)
    (sources / "a.py").write_text("two")
    changed = compiling.kernel(twice)
    changed(4)
    assert sum(changed.stats.cache_hits.values()) == 0


def test_beside_sources_that_cannot_be_written_to_the_users_folder_is_taken(sources: Path, tmp_path: Path) -> None:
    (sources / "__pycache__").write_text("no folder")
    assert compiling.kernel(twice)(4) == 8
    assert any((tmp_path / "home" / "memstore").rglob("*.nbc"))


def test_where_nothing_can_be_kept_code_is_compiled_all_the_same(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sources / "__pycache__").write_text("no folder")
    (tmp_path / "home").write_text("no folder")
    assert compiling.folder() is None
    assert compiling.kernel(twice)(4) == 8


def test_a_folder_that_others_can_write_to_is_not_trusted(sources: Path, tmp_path: Path) -> None:
    kept = compiling.folder()
    assert kept is not None
    kept.chmod(0o777)
    assert compiling.folder() == tmp_path / "home" / "memstore" / kept.name


def test_code_of_sources_that_are_long_gone_is_removed(sources: Path, tmp_path: Path) -> None:
    old = time.time() - compiling.STALE_S - 60
    home = tmp_path / "home" / "memstore"
    for parent in (sources / "__pycache__", home):
        for name in ("kernels-0123456789abcdef", "kernels-fedcba9876543210", "kernels-mine", "other"):
            (parent / name).mkdir(parents=True)
            (parent / name / "code.nbc").write_text("code")
        (parent / ".kernels-0123456789abcdef.7").mkdir()
        (parent / "kernels-00000000000000ff").symlink_to(parent / "other")
        for each in parent.iterdir():
            os.utime(each, (old, old), follow_symlinks=False)
        os.utime(parent / "kernels-fedcba9876543210")  # some process has begun with it since
    kept = compiling.folder()
    assert kept is not None
    rest = {"kernels-fedcba9876543210", "kernels-mine", "other", "kernels-00000000000000ff"}
    assert {path.name for path in home.iterdir()} == rest
    assert {path.name for path in kept.parent.iterdir()} == rest | {kept.name}
    assert (home / "other" / "code.nbc").exists()


def test_a_folder_of_code_that_is_in_use_is_said_to_be_so(sources: Path) -> None:
    kept = compiling.folder()
    assert kept is not None
    os.utime(kept, (0, 0))
    assert compiling.folder() == kept
    assert kept.stat().st_mtime > time.time() - 3600


def test_a_process_whose_folder_was_removed_goes_on(sources: Path) -> None:
    running = compiling.kernel(twice)
    running(4)
    kept = compiling.folder()
    assert kept is not None
    shutil.rmtree(kept)
    assert running(4.5) == 9.0
    assert compiling.kernel(twice)(4) == 8


def test_spoilt_code_is_compiled_again(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiling.kernel(twice)(4)
    for kept in (sources / "__pycache__").rglob("*.nb?"):
        kept.write_bytes(kept.read_bytes()[:20])
    with caplog.at_level(logging.WARNING, "memstore"):
        assert compiling.kernel(twice)(4) == 8
    assert "compiled code cannot be read" in caplog.text


def test_who_waits_for_code_to_be_compiled_is_told_once(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiling.tell_once.cache_clear()
    with caplog.at_level(logging.WARNING, "memstore"):
        assert compiling.kernel(twice)(4) == 8
        assert compiling.kernel(twice)(4.5) == 9.0
    (told,) = caplog.messages
    assert "search is compiled for this processor" in told
    caplog.clear()
    compiling.tell_once.cache_clear()
    with caplog.at_level(logging.DEBUG, "memstore"):
        assert compiling.kernel(twice)(4) == 8
    assert not caplog.messages


def test_an_index_searches_with_compiled_code() -> None:
    assert isinstance(INDEXES[IndexKind.EXACT]()._host, HostRetriever)  # type: ignore[attr-defined]


@pytest.mark.parametrize("first_pass", [FirstPass.ROWS, FirstPass.INT4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", Metric)
def test_rows_are_put_where_torch_puts_them(metric: Metric, dtype: torch.dtype, first_pass: FirstPass) -> None:
    payloads = (
        PayloadSpec(name="norm", dtype=torch.bfloat16, shape=(2, 3)),
        PayloadSpec(name="at", dtype=torch.int64, shape=()),
    )
    spec = MemorySpec(
        name="m",
        dim=34,
        capacity=7,
        max_sequences=3,
        num_layers=2,
        dtype=dtype,
        metric=metric,
        payloads=payloads,
        first_pass=first_pass,
    )
    compiled, plain = Slab(spec, HOST), Slab(spec, HOST)
    cells = plain.in_all_layers(torch.tensor([20, 0, 6, 7, 13]))
    keys = torch.randn(2, 5, spec.dim) * torch.tensor([0.0, 1e-3, 1.0, 100.0, 1.0])[:, None]
    kept = {"norm": torch.randn(2, 5, 2, 3).bfloat16(), "at": torch.arange(10).view(2, 5)}
    placing.put(compiled, compiled.stage(keys, kept, placing.norms_of), cells.numpy())
    plain.write(plain.stage(keys, kept), cells)
    every = torch.arange(spec.capacity * spec.max_sequences)
    for mine, theirs in zip(compiled.rows(every).arrays, plain.rows(every).arrays, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    if compiled.codes is not None and plain.codes is not None:
        assert torch.equal(compiled.codes, plain.codes)
        torch.testing.assert_close(compiled.terms, plain.terms, rtol=1e-5, atol=1e-5)
