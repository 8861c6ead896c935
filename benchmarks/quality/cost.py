"""Cost: one retrieval for all heads and layers against one for each head, in process and through a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality.table import K
from benchmarks.report import interleaved
from integration.demo.server import running_server
from model_client import MemoryClient, Retrieval

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.quality.table import Table

SEGMENT, ENTRIES, ROUNDS = 512, 16 * K, 7
ONE, EACH = "one retrieval for all heads", "one for each of 8 heads"


def cost(table: Table) -> None:
    """Table 2: time and bytes a token of a segment's step, retrieval and append; the ways are measured in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        running_server() as address,
        MemoryClient(address, timeout_s=60.0) as near,
        MemoryClient(address, timeout_s=60.0, plane="inline") as far,
    ):
        ways = {"in process": table.client, "server, lent memory": near, "server, messages": far}
        steps: dict[str, Callable[[], Any]] = {}
        for way, client in ways.items():
            steps[f"{way}, {ONE}"] = step_of(client, f"one-{way}", layers=1, dim=256, device=device)
            steps[f"{way}, {EACH}"] = step_of(client, f"each-{way}", layers=8, dim=32, device=device)
        for case, seconds in interleaved(steps, ROUNDS).items():
            table.report.add(case, "time a token", 1e6 * seconds / SEGMENT, "us")
            table.report.add(case, "bytes kept a token", 2 * 256 if ONE in case else 2 * 2 * 8 * 32, "bytes")


def step_of(client: MemoryClient, name: str, *, layers: int, dim: int, device: str) -> Callable[[], Any]:
    """A step of one full document; with several layers each row has a value beside its key, as a head's KV has."""
    name = name.replace(" ", "-").replace(",", "")
    payloads = {"value": (torch.float16, (dim,))} if layers > 1 else {}
    client.create_memory(
        name, dim=dim, num_layers=layers, capacity=ENTRIES, max_sequences=1, dtype=torch.float16, payloads=payloads
    )
    session = client.session(name, ["document"])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ENTRIES, layers, dim, generator=generator).cumsum(dim=0)  # neighbours alike, as states are
    rows = torch.nn.functional.layer_norm(rows, (dim,)).transpose(0, 1).half().contiguous().to(device)
    wanted = (
        Retrieval(32, arrays=("key", "value"), scores=False) if layers > 1 else Retrieval(16, after=2, scores=False)
    )

    def given(begin: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        part = rows[:, begin : begin + SEGMENT].contiguous()
        return part, {"value": part} if layers > 1 else {}

    for begin in range(0, ENTRIES, SEGMENT):
        keys, values = given(begin)
        session.append(keys, [SEGMENT], payloads=values)
    keys, values = given(ENTRIES // 2)
    return lambda: session.step(keys, [SEGMENT], retrieve=wanted, append=True, payloads=values)
