"""The quality tables: `python -m benchmarks.quality.tables TABLE --data D` writes quality-TABLE.json.

Every reading goes through memstore's own service in this process, but for the policies of `eviction`.
Intervals are 95% t intervals over documents of the difference of mean losses, in per cent of perplexity.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality.cost import cost
from benchmarks.quality.fidelity import fidelity
from benchmarks.quality.fleet import LOG
from benchmarks.quality.looking import ages, mentions
from benchmarks.quality.network import NetworkSpec
from benchmarks.quality.policies import POLICIES, PolicyCache, PolicyNetwork
from benchmarks.quality.reading import Reading, read
from benchmarks.quality.recall import recall
from benchmarks.quality.streams import DOMAINS
from benchmarks.quality.table import BASE, LENGTH, K, Table, interval, join, percent
from integration.training.judge import autocast

REPORTED_STEPS = 50  # of training, one loss for each so many
LONG_FROM = 900


SAID = {"lora-1024": "LoRA only, window 1,024", "mt": "Memorizing Transformers", "ours-16k": "ours trained with 16K"}


def capacity(table: Table) -> None:
    """Table 1: perplexity against capacity, and with another document's memory."""
    options, losses = table.options, {}
    for domain in options.domains:
        windows = table.windows(domain)
        goals = {16 * K: -8.0 if domain == "books" else -15.0, 128 * K: -10.0}
        base = read(table.variant("lora"), windows.ids)
        table.add(f"{domain}, LoRA only", base, windows)
        table.add(f"{domain}, nothing trained", read(table.variant("base"), windows.ids), windows, base)
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


def eviction(table: Table) -> None:
    """Table 6: what leaves when full, in the reference cache, against memstore's FIFO."""

    options, variant = table.options, table.variant("ours")
    config, device = variant.adapter.config, next(variant.model.parameters()).device
    shares, length = (4, 16), options.length // 2
    for domain in options.domains:
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
    for domain in table.options.domains:
        windows = table.windows(domain)
        base = read(table.variant("lora"), windows.ids)
        table.add(f"{domain}, LoRA only", base, windows)
        for entries in (16 * K, 128 * K):
            if entries == 16 * K or entries <= table.options.length:  # more would hold nothing more
                reading = read(table.variant("ours"), windows.ids, capacity=entries, client=table.client)
                table.add(f"{domain}, ours, {entries // K}K entries", reading, windows, base)
        table.write()


def trials(table: Table) -> None:
    """Tables 3, 4, 5 and 7: short trainings at equal steps, read on validation documents, against `lora`."""
    lines = (table.runs / LOG).read_text().splitlines()
    found = {row["name"]: row for row in map(json.loads, lines)}
    baseline, table.curves = found["lora"], {}
    for name, row in found.items():
        reading = next(key for key in row if key.startswith("read_") and key != "read_s")
        case = f"{name}, {row['steps']} steps"
        table.curves[name] = {key: row[key] for key in ("steps", "steps_per_s", "trial", "losses")}
        for domain in DOMAINS:
            table.documents[f"{domain}, {name}"] = dict(enumerate(row[reading][domain]))
            if row is baseline or row["steps"] != baseline["steps"]:
                continue
            differences = np.array(row[reading][domain]) - np.array(baseline[reading][domain])
            low, high = interval(differences)
            table.report.add(case, f"{domain} against LoRA only", percent(float(differences.mean())), "%")
            table.report.add(case, f"{domain}, low end", percent(low), "%")
            table.report.add(case, f"{domain}, high end", percent(high), "%")
        if row["steps"] == baseline["steps"]:
            table.report.add(case, "steps a second", row["steps_per_s"], "1/s", better="higher")


def shorts(table: Table) -> None:
    """Training losses over the same data in the same order, while no document has been seen twice.

    Short runs: mean of the second half of their steps, against lora-short. Longer ones: of the steps from LONG_FROM to
    the last that all of them reached, against lora.
    """
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(table.runs.glob("*/report.json"))}
    part = table.options.part or "base"
    told = ("steps", "seconds", "batch", "segment", "rate", "seed", "trained_parameters", "losses")
    table.curves = {f"{part}, {name}": {key: each[key] for key in told} for name, each in found.items()}
    short = {name: each for name, each in found.items() if each["steps"] <= LONG_FROM}
    long = {name: each for name, each in found.items() if each["steps"] > LONG_FROM}
    for group, baseline, said in ((short, "lora-short", "short"), (long, "lora", "long")):
        if baseline not in group:
            continue
        last = min(each["steps"] for each in group.values()) // REPORTED_STEPS
        first = last // 2 if group is short else LONG_FROM // REPORTED_STEPS
        nats = {name: float(np.mean(each["losses"][first:last])) for name, each in group.items()}
        for name, value in nats.items():
            case = f"{part}, {said} run, {name}, steps {first * REPORTED_STEPS} to {last * REPORTED_STEPS}"
            table.report.add(case, "training loss", value, "nats a token")
            table.report.add(case, "perplexity against LoRA only", percent(value - nats[baseline]), "%")


TABLES = {
    each.__name__: each
    for each in (
        capacity,
        fidelity,
        shorts,
        trials,
        eviction,
        domains,
        ages,
        mentions,
        cost,
        recall,
    )
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help=f"one or more of {', '.join(TABLES)}, joined by commas")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the base model (default: the demo's)")
    parser.add_argument(
        "--runs", type=Path, help="folder of trained variants (default: ours and LoRA only, as they ship)"
    )
    parser.add_argument("--data", type=Path, help="folder that benchmarks.quality.data wrote")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of each document")
    parser.add_argument("--capacities", type=int, nargs="+", default=[0, 4 * K, 16 * K, 64 * K, 128 * K])
    parser.add_argument("--domains", nargs="+", default=["books", "code"], help="of all tables but trials and shorts")
    parser.add_argument("--variants", nargs="+", default=["ours", "mt", "lora-1024"], help="of capacity")
    parser.add_argument("--page", type=Path, help="HTML file that `mentions` writes")
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
