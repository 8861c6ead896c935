"""The quality tables: `python -m benchmarks.quality.tables TABLE --base B --runs R --data D` writes quality-TABLE.json.

Every reading goes through memstore's own service in this process, but for the policies of `eviction`.
Intervals are 95% t intervals over documents of the difference of mean losses, in per cent of perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report as reports
from benchmarks.quality import data
from benchmarks.quality.reading import Reading, Variant, read, states_at
from integration.training.judge import autocast
from model_client import MemoryClient

K = 1024
T_975 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
    15: 2.145,
    20: 2.093,
}


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95% t interval of the mean of (n,) differences."""
    n = len(differences)
    if n < 2:
        return (float("nan"), float("nan"))
    t = T_975.get(n, 2.0)
    half = t * float(differences.std(ddof=1)) / math.sqrt(n)
    return float(differences.mean()) - half, float(differences.mean()) + half


def percent(nats: float) -> float:
    """A difference of mean losses as per cent of perplexity."""
    return 100.0 * (math.exp(nats) - 1.0)


class Table:
    """One table: readings against a baseline reading, written with every document's loss."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.report = reports.Report(f"quality-{name}" + (f"@{options.part}" if options.part else ""))
        self.documents: dict[str, Any] = {}
        self.client = MemoryClient(":memory:", device="cuda" if torch.cuda.is_available() else "cpu", timeout_s=120.0)
        self._variants: dict[str, Variant] = {}
        self._windows: dict[tuple[str, str, int], data.Windows] = {}

    def variant(self, name: str) -> Variant:
        """A trained variant by name, loaded once; KeyError where its folder is missing."""
        if name not in self._variants:
            folder = self.options.runs / name
            until = time.monotonic() + self.options.wait
            while not (folder / "report.json").exists() and time.monotonic() < until:
                time.sleep(0.2)
            if not (folder / "report.json").exists():
                raise KeyError(name)
            self._variants = {name: Variant.load(self.options.base, folder)}
        return self._variants[name]

    def warm(self) -> None:
        """Compiles what the first step would wait for."""
        session = self.client.create_memory("warm", dim=8, capacity=64, exist_ok=True) and self.client.session(
            "warm", ["a"]
        )
        session.append(torch.zeros(64, 8, device="cuda" if torch.cuda.is_available() else "cpu"), [64])
        self.client.drop_memory("warm")

    def windows(self, domain: str, split: str = "test", length: int = 0) -> data.Windows:
        """The documents of a domain, `length` tokens each."""
        key = (domain, split, length or self.options.length)
        if key not in self._windows:
            self._windows[key] = data.windows(self.options.data, domain, split, key[2])
        return self._windows[key]

    def add(
        self,
        case: str,
        reading: Reading,
        windows: data.Windows,
        baseline: Reading | None = None,
        goal: float | None = None,
    ) -> None:
        """Rows of one reading: perplexity, bits a byte, and its change against the baseline with the interval."""
        nats = reading.per_document
        self.documents[case] = dict(zip(windows.names, [round(float(each), 5) for each in nats], strict=True))
        self.report.add(case, "perplexity", math.exp(nats.mean()), "per token")
        bits = reading.losses.sum(axis=1, dtype=np.float64) / math.log(2) / windows.num_bytes
        self.report.add(case, "bits a byte", float(bits.mean()), "bits")
        if baseline is not None:
            differences = nats - baseline.per_document
            low, high = interval(differences)
            self.report.add(case, "perplexity against baseline", percent(float(differences.mean())), "%", goal=goal)
            self.report.add(case, "the same, low end", percent(low), "%")
            self.report.add(case, "the same, high end", percent(high), "%")

    def write(self) -> None:
        """The JSON of the report, with the documents' losses and the commit of an exported tree beside the rows."""
        path = self.report.write()
        content = json.loads(path.read_text())
        content["command"] = f"python -m benchmarks.quality.tables {self.name}"
        commit = Path("COMMIT")
        if content["commit"] == "unknown" and commit.exists():
            content["commit"] = commit.read_text().strip()
        content["nats_of_each_document"] = self.documents
        path.write_text(json.dumps(content, indent=1) + "\n")


SAID = {"lora-1024": "LoRA only, window 1,024", "mt": "Memorizing Transformers", "ours": "ours"}


def capacity(table: Table) -> None:
    """Table 1: perplexity against capacity, and with another document's memory."""
    options, losses = table.options, {}
    for domain in options.domains:
        windows = table.windows(domain)
        goals = {16 * K: -8.0 if domain == "books" else -15.0, 128 * K: -10.0}
        base = read(table.variant("lora"), windows.ids)
        table.add(f"{domain}, LoRA only", base, windows)
        losses[f"{domain}/lora/0"] = base.losses.astype(np.float16)
        for name in options.variants:
            entries_of = (0,) if name == "lora-1024" else options.capacities
            for entries in entries_of:
                reading = read(table.variant(name), windows.ids, capacity=entries, client=table.client)
                said = SAID.get(name, name)
                case = f"{domain}, {said}, {entries // K}K entries" if name != "lora-1024" else f"{domain}, {said}"
                table.add(case, reading, windows, base, goal=goals.get(entries) if name == "ours" else None)
                if name == "ours" or entries in (0, 16 * K):
                    losses[f"{domain}/{name}/{entries}"] = reading.losses.astype(np.float16)
            if name == "ours":
                other = read(table.variant(name), windows.ids, capacity=16 * K, client=table.client, other=True)
                table.add(f"{domain}, another document's memory, 16K entries", other, windows, base)
                losses[f"{domain}/other/{16 * K}"] = other.losses.astype(np.float16)
            table.write()
    if options.losses:
        np.savez_compressed(options.losses.with_name(f"losses-{options.part or 'all'}.npz"), **losses)


def compare(table: Table, names: list[str], baseline: str = "lora-short") -> None:
    """One line a variant at 16K entries, books and code, against a variant."""
    for domain in ("books", "code"):
        windows = table.windows(domain, length=table.options.length // 4)
        base = None
        for name in [baseline, *names]:
            try:
                variant = table.variant(name)
            except KeyError:
                continue
            entries = 0 if variant.report["kind"] == "lora" else table.options.capacity
            reading = read(variant, windows.ids, capacity=entries, client=table.client)
            table.add(f"{domain}, {name}", reading, windows, base)
            base = base or reading
        table.write()


def compression(table: Table) -> None:
    """Table 3: width of the key; how well neighbours in the narrow space are those of the full one."""
    compare(table, ["dim-256", "ours-short", "dim-64", "dim-32", "dim-16", "pca-fixed", "random-fixed"])
    for domain in ("books", "code"):
        windows = table.windows(domain, length=min(table.options.length, 16 * K))
        variant = table.variant("ours")
        layer = int(variant.report["layer"])
        states = states_at(variant, windows.ids, layer)
        for name in ("dim-256", "ours", "ours-short", "dim-64", "dim-32", "dim-16"):
            fidelity(table, f"{domain}, learned, {name}", states, _learned(table, name))
        for dim in (256, 128, 64, 32, 16):
            for method in ("pca", "random"):
                fidelity(table, f"{domain}, {method}, dim-{dim}", states, _made(states, method, dim))


def _learned(table: Table, name: str) -> Any:
    try:
        return table.variant(name).adapter.weights.projection
    except KeyError:
        return None


def _made(states: torch.Tensor, method: str, dim: int) -> Any:
    from model_client.cache_attention import StateProjection

    torch.manual_seed(0)
    projection = StateProjection(states.shape[-1], min(dim, states.shape[-1])).to(states.device)
    if method == "pca":
        projection.fit(states[:, 1:4097])
    return projection


@torch.no_grad()
def fidelity(table: Table, case: str, states: torch.Tensor, projection: Any, top_k: int = 16) -> None:
    """recall@k against neighbours in the full space (states with unit variance), and how much farther those found are."""
    if projection is None:
        return
    recalls, ratios = [], []
    for document in states:
        full = torch.nn.functional.layer_norm(document, document.shape[-1:])
        narrow = projection(document)
        queries = torch.arange(len(full) * 3 // 4, len(full), 16, device=full.device)
        kept = torch.arange(len(full) * 3 // 4, device=full.device)
        true = torch.cdist(full[queries], full[kept])
        near = true.topk(top_k, dim=1, largest=False)
        found = torch.cdist(narrow[queries], narrow[kept]).topk(top_k, dim=1, largest=False).indices
        recalls.append((found[:, :, None] == near.indices[:, None, :]).any(dim=2).float().mean().item())
        ratios.append((true.gather(1, found).mean() / near.values.mean()).item())
    table.report.add(case, f"recall@{top_k}", float(np.mean(recalls)), "ratio", better="higher")
    table.report.add(case, "distance of those found / of the nearest", float(np.mean(ratios)), "ratio")


def grid(table: Table) -> None:
    """Table 5: window and context."""
    compare(table, [f"w{w}-c{c}" for w in (0, 1, 2, 4) for c in (0, 1, 2, 4)])


def layers(table: Table) -> None:
    """Table 7: which layer stores and which read."""
    names = [
        "store-7-read-7",
        "store-6-read-6",
        "store-6-read-7",
        "ours-short",
        "store-4-read-6-7",
        "store-4-read-4-7",
        "store-2-read-2-7",
    ]
    compare(table, names)


def pilots(table: Table) -> None:
    """Choices made on the validation documents."""
    names = sorted(path.parent.name for path in table.options.runs.glob("*/report.json"))
    for domain in ("books", "code"):
        windows = table.windows(domain, "validation", table.options.length // 4)
        base = None
        for name in sorted(names, key=lambda each: not each.startswith("lora")):
            variant = table.variant(name)
            entries = 0 if variant.report["kind"] == "lora" else table.options.capacity
            reading = read(variant, windows.ids, capacity=entries, client=table.client)
            table.add(f"{domain}, {name}", reading, windows, base)
            base = base or reading


def eviction(table: Table) -> None:
    """Table 6: what leaves when full, in the reference cache, against memstore's FIFO."""
    from benchmarks.quality.network import NetworkSpec
    from benchmarks.quality.policies import POLICIES, PolicyCache, PolicyNetwork

    variant = table.variant("ours")
    config, device = variant.adapter.config, next(variant.model.parameters()).device
    shares, length = (4, 16), table.options.length // 2
    for domain in ("books", "code"):
        windows = table.windows(domain, length=length)
        base = read(table.variant("ours"), windows.ids)
        table.add(f"{domain}, no memory", base, windows)
        variant = table.variant("ours")
        services = {}
        for share in shares:
            entries = length // share
            services[share] = read(variant, windows.ids, capacity=entries, client=table.client)
            table.add(f"{domain}, 1/{share} of the document, memstore (FIFO)", services[share], windows, base)
        network = PolicyNetwork(variant.model, NetworkSpec(kind="memory", config=config, lora_rank=0))
        network.weights.load_state_dict(variant.adapter.weights.state_dict())
        for share in shares:
            entries = length // share
            for policy in POLICIES:
                network.cache = PolicyCache(policy, len(windows.ids), entries, config.dim, length, device)
                kept = []
                with torch.no_grad():
                    for begin in range(0, length, 512):
                        part = torch.from_numpy(windows.ids[:, begin : begin + 513]).to(device)
                        with autocast(device):
                            kept.append(network.losses(part))
                reading = Reading(losses=torch.cat(kept, dim=1).cpu().numpy(), seconds=0.0)
                table.add(f"{domain}, 1/{share} of the document, {policy}", reading, windows, services[share])
            table.write()
        network.cache = None
        table._variants = {}


def domains(table: Table) -> None:
    """Table 8: the same memory on books, code and technical prose."""
    for domain in ("books", "code", "docs"):
        windows = table.windows(domain)
        base = read(table.variant("lora"), windows.ids)
        table.add(f"{domain}, LoRA only", base, windows)
        for entries in (16 * K, 128 * K):
            reading = read(table.variant("ours"), windows.ids, capacity=entries, client=table.client)
            table.add(f"{domain}, ours, {entries // K}K entries", reading, windows, base)
        table.write()


def ages(table: Table) -> None:
    """Table 9: age of hits and of attention; hits that a control query would not have made."""
    rng, edges = np.random.default_rng(0), 2.0 ** np.arange(9, 18)
    for domain in ("books", "code"):
        windows = table.windows(domain)
        hits, mass, novel, sources, shares = np.zeros(10), np.zeros(10), [], [], []
        width = 0

        def watch(begin: int, trace: Any) -> None:
            nonlocal width
            positions, weights = trace.positions.numpy(), trace.mass.numpy()
            rows = len(windows.ids)
            count = len(positions) // rows
            own = table.variant("ours").adapter.config
            width = own.top_k * own.window
            tokens = begin + np.tile(np.arange(count), rows)
            best = weights.argmax(axis=1)
            lines = np.arange(len(positions))
            sources.append(positions[lines, best].reshape(rows, count).astype(np.int32))
            shares.append(weights[lines, best].reshape(rows, count).astype(np.float16))
            if (begin // 512) % 8 != 7:
                return
            is_read = positions >= 0
            age = np.digitize((tokens[:, None] - positions)[is_read], edges)
            hits[:] += np.bincount(age, minlength=10)[:10]
            mass[:] += np.bincount(age, weights=weights[is_read], minlength=10)[:10]
            if begin >= 16 * K:
                mine = positions[:count, :width]
                control = mine[rng.permutation(count)]
                same = (mine[:, :, None] == control[:, None, :]).any(axis=2)
                novel.append(float((~same & (mine >= 0)).sum() / max(1, (mine >= 0).sum())))

        variant = table.variant("ours")
        reading = read(variant, windows.ids, capacity=128 * K, client=table.client, watch=watch)
        names = ["under 512", *[f"{int(edges[n])} to {int(edges[n + 1])}" for n in range(8)], "over 131072"]
        for number, name in enumerate(names):
            table.report.add(f"{domain}, age {name}", "share of hits", hits[number] / hits.sum(), "ratio")
            table.report.add(f"{domain}, age {name}", "share of attention", mass[number] / mass.sum(), "ratio")
        table.report.add(
            f"{domain}, hits", "not made by another token's query", float(np.mean(novel)), "ratio", better="higher"
        )
        if table.options.losses:
            out = table.options.losses.with_name(f"sources-{domain}.npz")
            kept = {"source": np.concatenate(sources, axis=1)[:, : windows.ids.shape[1] - 1]}
            kept["share"] = np.concatenate(shares, axis=1)[:, : windows.ids.shape[1] - 1]
            np.savez_compressed(out, losses=reading.losses.astype(np.float16), **kept)


def cost(table: Table) -> None:
    """Table 2: time and bytes a token; ours retrieves once for all heads, Memorizing Transformers once for each."""
    windows = table.windows("books", length=table.options.length // 2)
    for name in ("lora", "ours", "mt"):
        variant = table.variant(name)
        for entries in (0,) if name == "lora" else (16 * K, 64 * K):
            read(variant, windows.ids[:, : 4 * 512 + 1], capacity=entries, client=table.client)
            times = []
            for _ in range(2):
                reading = read(variant, windows.ids, capacity=entries, client=table.client)
                times.append(1e6 * reading.seconds / reading.losses.size)
            case = f"{name}, {entries // K}K entries"
            table.report.add(case, "time a token, in process", min(times), "us")
            if entries:
                own = variant.adapter.config if variant.adapter else None
                bytes_kept = 2 * own.dim if own else 2 * 2 * variant.model.config.hidden_size
                table.report.add(case, "bytes kept a token", bytes_kept, "bytes")
                table.report.add(
                    case,
                    "reserved for the memory, a token",
                    reading.reserved_bytes / entries / len(windows.ids),
                    "bytes",
                )


def passkey(table: Table) -> None:
    """A key told once, asked for 8K to 128K tokens later: loss and accuracy of its digits, with and without memory."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(table.options.data / "tokenizer.json"))
    variant = table.variant("ours")
    rng = np.random.default_rng(0)
    source = table.windows("books", length=table.options.length)
    books = np.concatenate([source.ids, table.windows("books", "validation").ids])
    for distance in (8 * K, 32 * K, 128 * K - 2 * K):
        distance = min(distance, table.options.length - 1024)
        rows, spans = [], []
        for book in books:
            key = "".join(str(each) for each in rng.integers(0, 10, 10))
            told = tokenizer.encode(f"\n\nThe pass key of the old house is {key}. Remember it.\n\n").ids
            asked = tokenizer.encode("\n\nThe pass key of the old house is").ids
            answer = tokenizer.encode(f" {key}").ids[: len(told)]
            row = np.concatenate([book[:512], told, book[512 : distance + 512], asked, answer])
            spans.append((len(row) - len(answer), len(answer)))
            rows.append(row)
        length = max(len(row) for row in rows)
        ids = np.stack([np.pad(row, (0, length - len(row)), constant_values=0) for row in rows])
        for entries, said in ((0, "no memory"), (128 * K, "memory")):
            reading = read(variant, ids, capacity=entries, client=table.client)
            nats = [
                reading.losses[row, begin - 1 : begin - 1 + count].mean() for row, (begin, count) in enumerate(spans)
            ]
            table.report.add(
                f"passkey, {distance} tokens before, {said}", "loss of its digits", float(np.mean(nats)), "nats a token"
            )


TABLES = {
    each.__name__: each
    for each in (capacity, compression, grid, layers, pilots, eviction, domains, ages, cost, passkey)
}


def join(name: str) -> None:
    """Makes quality-NAME.json of quality-NAME@*.json."""
    parts = sorted(reports.RESULTS.glob(f"quality-{name}@*.json"))
    contents = [json.loads(part.read_text()) for part in parts]
    rows = {(row["case"], row["figure"]): row for content in contents for row in content["rows"]}
    joined = contents[0] | {"rows": list(rows.values()), "nats_of_each_document": {}}
    for content in contents:
        joined["nats_of_each_document"] |= content["nats_of_each_document"]
    (reports.RESULTS / f"quality-{name}.json").write_text(json.dumps(joined, indent=1) + "\n")
    for part in parts:
        part.unlink()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help=f"one or more of {', '.join(TABLES)}, joined by commas")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--length", type=int, default=128 * K, help="tokens of each document")
    parser.add_argument("--capacity", type=int, default=16 * K, help="where a table has one")
    parser.add_argument("--capacities", type=int, nargs="+", default=[0, 4 * K, 16 * K, 64 * K, 128 * K])
    parser.add_argument("--domains", nargs="+", default=["books", "code"], help="of capacity")
    parser.add_argument("--variants", nargs="+", default=["ours", "mt", "lora-1024"], help="of capacity")
    parser.add_argument("--part", default="", help="names the file of a part; `join` makes one file of all parts")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a variant that is in training")
    parser.add_argument("--losses", type=Path, help=".npz for the losses of each token")
    return parser.parse_args()


def main() -> int:
    """Makes tables; one that fails does not stop the others."""
    options, failed = parse(), 0
    if options.table.startswith("join:"):
        join(options.table.removeprefix("join:"))
        return 0
    torch.set_float32_matmul_precision("high")
    for name in options.table.split(","):
        begun, table = time.perf_counter(), Table(name, options)
        table.warm()
        try:
            TABLES[name](table)
        except Exception as error:
            import traceback

            traceback.print_exc()
            print(f"{name}: {error!r}", flush=True)
            failed += 1
        if table.report.rows:
            table.write()
        table.client.close()
        print(f"{name}: {time.perf_counter() - begun:.1f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
