"""What comes of more requests than the device can serve: useful answers, their latency, and whose they are.

made up     the server's queue, admission, turns and joining before an engine that takes a stated time, in virtual time:
            the same on every machine. Poisson arrivals of fixed seeds; an answer within the patience is of use
real        the same with the search of this machine and its clock, arrivals at their time from one thread, in windows
            that come round several times: the median of the goodputs, the p99 of all latencies
saturated   two tenants without a pause, one with 64 times the other's queries: whose the time of the device's thread is

The first two each with admission as it is, with no more than late calls dropped before the device, and with nothing: a
queue without end, first come first served, that knows no deadlines. On a GPU the last alone: there a request is so
quick that asking costs as much.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.real_load import Boundless, Real, poisson, request, weaken
from benchmarks.report import RESULTS, Report
from memstore.device import device_of
from tests.loading import Cost, Load, Source, Tally
from tests.saturating import Saturation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.real_load import Window

COST = Cost(call_s=0.0002, row_s=0.0008)
"""1,000 to 1,250 requests a second, by how many are joined."""
CAPACITY = 1000.0
PATIENCE_S = 0.05
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
KINDS = ("memstore", "late calls dropped", "nothing")
NAMES = {"memstore": "with admission", "late calls dropped": "late calls dropped only", "nothing": "without"}
Point = tuple[float, float]
"""Useful answers a second, and the 99th percentile of the latency of all answers, in seconds; both as shares where they
are of a real device: of what it can do, and of the patience.
"""
REAL_FACTORS = (0.5, 1.0, 1.5, 3.0)
FLOOD = {"good": 0.4, "flood": 3.0}
"""Of what the device can do."""
SATURATED_S = 3.0
ROUNDS = 3


def run_made_up(kind: str, rates: dict[str, float], seconds: float) -> dict[str, Tally]:
    """What became of each tenant's requests, in virtual time."""
    sources = [
        Source(tenant=tenant, arrivals=poisson(rate, seconds, seed), patience_s=PATIENCE_S, tells=kind != "nothing")
        for seed, (tenant, rate) in enumerate(rates.items())
    ]
    load = Load(sources, None if kind == "memstore" else Boundless(), cost=COST)
    weaken(load.worker, kind)
    return load.run()


def point(tally: Tally, seconds: float) -> Point:
    """The figures of one run."""
    return tally.useful / seconds, _p99(tally.latencies)


def _p99(latencies: Sequence[float]) -> float:
    return float(np.quantile(latencies, 0.99)) if latencies else 0.0


def tell(report: Report, where: str, curves: dict[str, dict[float, Point]]) -> None:
    """Rows of one set of curves. Goals are for those that no other work on the machine can disturb."""
    is_real = where == "real"
    for kind, curve in curves.items():
        case = f"{where}, {NAMES[kind]}"
        least, most = (0.8, 1.2) if kind == "memstore" and not is_real else (None, None)
        ratio = curve[3.0][0] / max(goodput for goodput, _ in curve.values())
        report.add(case, "goodput at 3 x / peak", ratio, "ratio", goal=least, better="higher")
        late = curve[3.0][1] / (1.0 if is_real else PATIENCE_S)
        report.add(case, "p99 at 3 x / patience", late, "ratio", goal=most)
        for factor, (goodput, p99) in curve.items():
            if is_real:
                report.add(case, f"goodput at {factor:g} x / capacity", goodput, "ratio", better="higher")
                report.add(case, f"p99 at {factor:g} x / patience", p99, "ratio")
            else:
                report.add(case, f"goodput at {factor:g} x", goodput, "1/s", better="higher")
                report.add(case, f"p99 at {factor:g} x", 1e3 * p99, "ms")


def tell_share(report: Report, case: str, kind: str, share: float) -> None:
    """The row of a tenant that stays within its share beside a flood."""
    goal = 0.8 if kind == "memstore" and case.startswith("made up") else None
    report.add(f"{case}, {NAMES[kind]}", "well-behaved tenant / its share", share, "ratio", goal=goal, better="higher")


def made_up(report: Report, seconds: float) -> dict[str, dict[float, Point]]:
    """Curves in virtual time, and a tenant at 0.45 of the capacity beside one that offers five times all of it."""
    curves: dict[str, dict[float, Point]] = {}
    for kind in KINDS:
        curves[kind] = {
            factor: point(run_made_up(kind, {"t": factor * CAPACITY}, seconds)["t"], seconds) for factor in FACTORS
        }
    tell(report, "made up", curves)
    for kind in KINDS:
        tallies = run_made_up(kind, {"good": 0.45 * CAPACITY, "flood": 5 * CAPACITY}, seconds)
        tell_share(report, "made up, flood of 5 x", kind, _share([tallies["good"]]))
    return curves


def _share(tallies: Sequence[Tally]) -> float:
    """What of a tenant's requests was answered in time; the median of several windows."""
    return median(tally.useful / tally.offered for tally in tallies)


def real(report: Report, rounds: int) -> dict[str, dict[float, Point]]:
    """The same on this machine; patience is forty times what a request takes."""
    device = torch.device("cpu")
    servers = {kind: Real(kind, device) for kind in KINDS}
    windows: dict[str, dict[float, list[Window]]] = {kind: {factor: [] for factor in REAL_FACTORS} for kind in KINDS}
    floods: dict[str, list[Window]] = {kind: [] for kind in KINDS}
    for seed in range(0, 10 * rounds, 10):
        for factor in REAL_FACTORS:
            for kind, server in servers.items():
                windows[kind][factor].append(server.window({"good": factor}, seed))
        for kind, server in servers.items():
            floods[kind].append(server.window(FLOOD, seed))
    for server in servers.values():
        server.close()
    every = [window.capacity for of in windows.values() for each in of.values() for window in each]
    for name, capacity in (("median", median(every)), ("least", min(every)), ("most", max(every))):
        report.add("real", f"capacity, {name} of {len(every)} windows", capacity, "1/s", better="higher")
    curves = {kind: {factor: _figures(each) for factor, each in of.items()} for kind, of in windows.items()}
    tell(report, "real", curves)
    for kind, each in floods.items():
        tell_share(report, "real, flood of 3 x", kind, _share([window.tallies["good"] for window in each]))
    return curves


def _figures(windows: Sequence[Window]) -> Point:
    latencies = [latency for window in windows for latency in window.latencies]
    return median(window.goodput for window in windows), _p99(latencies)


def saturated(report: Report, device: torch.device) -> None:
    """Of the time of the device's thread; the goal is what is promised."""
    server = Real("memstore", device)
    asked = {"good": (request(0), 6), "flood": (request(1, 64), 64)}
    try:
        shares = Saturation(server.service, asked).run(SATURATED_S)
    finally:
        server.close()
    case = f"saturated, {device.type}, two tenants"
    report.add(case, "the smaller part / half of the time", min(shares.values()), "ratio", goal=0.8, better="higher")


def draw(made: dict[str, dict[float, Point]], measured: dict[str, dict[float, Point]]) -> None:
    """Offered load against goodput and latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    colours = dict(zip(KINDS, ("#2563ae", "#d1783c", "#8a8f98"), strict=True))
    shown = (
        ("made up, virtual time", made, 1e3, (" / s", ", ms")),
        ("this machine", measured, 1.0, (" / capacity", " / patience")),
    )
    for column, (title, curves, scale, units) in enumerate(shown):
        for kind, curve in curves.items():
            factors = list(curve)
            style = {"label": NAMES[kind], "color": colours[kind], "marker": "o", "markersize": 4}
            axes[0, column].plot(factors, [goodput for goodput, _ in curve.values()], **style)
            axes[1, column].plot(factors, [scale * p99 for _, p99 in curve.values()], **style)
        goodput, p99 = (f"useful answers{units[0]}", f"p99 of answers{units[1]}")
        axes[0, column].set(title=title, ylabel=goodput, ylim=(0, None), xscale="log")
        axes[1, column].set(xlabel="offered load / capacity", ylabel=p99, xscale="log", yscale="log")
        for each in axes[:, column]:
            each.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            each.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    figure.savefig(RESULTS / "overload.png", dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Measures, draws, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, and shorter virtual time")
    parser.add_argument("--device", default="cpu", help="cpu; with cuda whose the time of a saturated GPU is, alone")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    device = device_of(options.device)
    report = Report("overload" if device.type == "cpu" else "gpu-overload")
    if device.type == "cpu":
        made = made_up(report, 1.0 if options.quick else 4.0)
        draw(made, real(report, 1 if options.quick else ROUNDS))
    saturated(report, device)
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
