"""Kernels are started without Triton's search for them once they are compiled, where that is the same kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from memstore.gpu import launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Compiled:
    """What Triton gives for a call: keeps what it is started with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[object, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values: self.calls.append((grid, values))


class Kernel:
    """A function of Triton's: each call of it compiles."""

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.options: list[dict[str, object]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def call(*arguments: object, **options: object) -> Compiled:
            self.options.append(options)
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return call


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launcher, "_compiled", {})
    return Kernel()


def test_the_second_start_gets_addresses_numbers_and_constants(kernel: Kernel) -> None:
    rows = torch.zeros(64)
    launcher.start(kernel, (3,), rows, 7, WIDTH=8, num_warps=2, is_chained=True)
    launcher.start(kernel, (5, 2), rows, 9, WIDTH=8, num_warps=2, is_chained=True)
    assert kernel.options == [{"WIDTH": 8, "IS_CHAINED": True, "num_warps": 2, "launch_pdl": True}]
    ((grid, values),) = kernel.compiled[0].calls
    assert grid[:3] == (5, 2, 1)
    assert values == (rows.data_ptr(), 9, 8, True)


USUAL: dict[str, object] = {"rows": torch.zeros(64), "number": 7, "WIDTH": 8, "num_warps": 4, "is_chained": False}


def start_all(kernel: Kernel, kinds: Sequence[dict[str, object]]) -> None:
    for options in kinds:
        rows, number, *_ = options.values()
        others = {name: value for name, value in options.items() if name not in ("rows", "number")}
        launcher.start(kernel, (1,), rows, number, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [{"WIDTH": 16}, {"num_warps": 8}, {"is_chained": True}, {"rows": torch.zeros(64, dtype=torch.float16)}],
)
def test_another_kind_is_compiled_once(kernel: Kernel, changed: dict[str, object]) -> None:
    start_all(kernel, [USUAL, USUAL | changed, USUAL, USUAL | changed])
    assert [len(each.calls) for each in kernel.compiled] == [1, 1]


@pytest.mark.parametrize("changed", [{"rows": torch.zeros(64)[1:]}, {"number": 1 << 31}])
def test_unusual_addresses_and_numbers_are_left_to_triton(kernel: Kernel, changed: dict[str, object]) -> None:
    start_all(kernel, [USUAL | changed, USUAL, USUAL | changed, USUAL])
    assert [len(each.calls) for each in kernel.compiled] == [0, 1, 0]


def test_another_kernel_of_the_same_arguments_is_its_own(kernel: Kernel) -> None:
    other, rows = Kernel(), torch.zeros(64)
    for each in (kernel, other, kernel, other):
        launcher.start(each, (1,), rows, WIDTH=8)
    assert len(kernel.options) == len(other.options) == 1
