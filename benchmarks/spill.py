"""What it costs that a sequence leaves the device and comes back, and that the order of use is kept.

A sequence of 16,384 x 256 fp16 goes to host memory and to a file, and returns. The floor is one copy of its bytes on
the same machine: within host memory by one thread, or between a GPU and pinned host memory. (torch copies within host
memory by all its threads, and waits for each that has lost its core to another process: that is no floor.)
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.report import Report, interleaved
from memstore.memory import Memory
from memstore.seams import SystemDisk
from memstore.spill_file import SpillFolder
from memstore.types import KEY, MemorySpec, RetrieveOptions, SequencePart, SpillSpec, StepBatch

if TYPE_CHECKING:
    from collections.abc import Callable

CAPACITY, DIM = 16_384, 256
ROUNDS = 40
MANY = 1024


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the files are (default: a temporary folder)")
    options = parser.parse_args()
    device = torch.device(options.device)
    report = Report("spill" if device.type == "cpu" else "gpu-spill")
    with tempfile.TemporaryDirectory() as temporary:
        _moves(report, device, options.rounds, options.folder or Path(temporary))
    _order(report, device, options.rounds)
    report.write()


def _moves(report: Report, device: torch.device, rounds: int, folder: Path) -> None:
    hosted, filed = (_full(device, host, folder / str(host)) for host in (1, 0))
    num_bytes = CAPACITY * (DIM * 2 + 4)
    target = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(1)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    seconds = interleaved(
        {
            "floor": lambda: _settled(device, lambda: _copy(target, source)),
            "floor back": lambda: _settled(device, lambda: _copy(source, target)),
            "to host": lambda: _settled(device, lambda: _leave(hosted)),
            "from host": lambda: _settled(device, lambda: _come_back(hosted)),
            "to file": lambda: _settled(device, lambda: _leave(filed)),
            "from file": lambda: _settled(device, lambda: _come_back(filed)),
        },
        rounds,
    )
    case = f"{CAPACITY}x{DIM}"
    for name in ("floor", "floor back", "to host", "from host", "to file", "from file"):
        report.add(case, name.replace(" ", "_"), seconds[name] * 1e3, "ms")
    report.add(case, "to_host_over_floor", seconds["to host"] / seconds["floor"], "ratio", goal=1.5)
    report.add(case, "from_host_over_floor", seconds["from host"] / seconds["floor back"], "ratio", goal=1.5)
    for name in ("to file", "from file"):
        gigabytes = num_bytes / seconds[name] / 1e9
        report.add(case, f"{name.replace(' ', '_')}_rate", gigabytes, "GB/s", better="higher")
    for memory in (hosted, filed):
        memory.free()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """The fastest that can be relied on."""
    if source.device == target.device:
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source, non_blocking=True)


def _order(report: Report, device: torch.device, rounds: int) -> None:
    """What a step costs more where the order of use is kept, for each of its sequences."""
    kept, plain = (_crowd(device, spill) for spill in (SpillSpec(max_sequences=1, host_sequences=1), SpillSpec()))
    parts = tuple(SequencePart(sequence=str(number), num_rows=1) for number in range(MANY))
    batch = StepBatch(parts=parts, layers=(0,), keys=torch.zeros(1, MANY, 4), append=True)
    calls = {
        "kept": lambda: _settled(device, lambda: kept.step([batch])),
        "plain": lambda: _settled(device, lambda: plain.step([batch])),
        "touch": lambda: kept.lifecycle._touch_parts([batch]),
    }
    seconds = interleaved(calls, rounds)
    report.add(f"step of {MANY}", "order_of_use", seconds["touch"] / MANY * 1e6, "us a sequence", goal=1.0)
    report.add(f"step of {MANY}", "with_over_without", seconds["kept"] / seconds["plain"], "ratio")
    for memory in (kept, plain):
        memory.free()


def _full(device: torch.device, num_on_host: int, folder: Path) -> Memory:
    """A memory with one place, and one sequence, that has wrapped."""
    spill = SpillSpec(max_sequences=1, host_sequences=num_on_host)
    spec = MemorySpec(name="m", dim=DIM, capacity=CAPACITY, spill=spill)
    memory = Memory(spec, device, new_epoch=itertools.count(1).__next__)
    if memory.lifecycle.spill is not None:
        memory.lifecycle.spill.tiers.files.folder = SpillFolder(folder, SystemDisk())
    part = SequencePart(sequence="a", num_rows=CAPACITY + CAPACITY // 2)
    keys = torch.randn(1, part.num_rows, DIM)
    memory.step([StepBatch(parts=(part,), layers=(0,), keys=keys, append=True)])
    found = memory.step([_look(keys[:, -1:])])
    _leave(memory)
    _come_back(memory)
    again = memory.step([_look(keys[:, -1:])])
    if str(found) != str(again):
        raise AssertionError("it did not come back as it was")
    return memory


def _look(keys: torch.Tensor) -> StepBatch:
    part = SequencePart(sequence="a", num_rows=1)
    return StepBatch(parts=(part,), layers=(0,), keys=keys, retrieve=RetrieveOptions(top_k=8, arrays=(KEY,)))


def _crowd(device: torch.device, spill: SpillSpec) -> Memory:
    spec = MemorySpec(name="m", dim=4, capacity=4, max_sequences=MANY, spill=spill)
    return Memory(spec, device, new_epoch=itertools.count(1).__next__)


def _leave(memory: Memory) -> None:
    if memory.lifecycle.spill is not None:
        memory.lifecycle.spill.leave("a", 0.0, None)


def _come_back(memory: Memory) -> None:
    if memory.lifecycle.spill is not None:
        memory.lifecycle.spill.come_back("a")


def _settled(device: torch.device, run: Callable[[], object]) -> None:
    """Runs it, and waits for the device."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
