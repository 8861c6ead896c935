"""Trains what a variant has beside the frozen base, for a number of steps or of seconds; resumable.

python -m benchmarks.quality.adapt --base runs/base --data tokens --variant ours --out runs/ours --steps 4000
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.quality.data import load
from benchmarks.quality.network import Network, NetworkSpec, initialise, run_layers
from benchmarks.quality.variants import spec_of
from integration.adapter import save_adapter
from integration.training.documents import Streams
from integration.training.judge import autocast

WARMUP = 100
MAX_SEGMENTS = 256


class TwoStreams:
    """Half of the rows read books, half code."""

    def __init__(self, folder: Path, batch: int, segment: int, seed: int, device: torch.device) -> None:
        self._parts = [
            Streams(
                load(folder, domain, "train")[0],
                batch=batch // 2,
                segment=segment,
                max_segments=MAX_SEGMENTS * 512 // segment,
                seed=seed,
                device=device,
            )
            for domain in ("books", "code")
        ]
        self._half = batch // 2

    def next_batch(self) -> tuple[Tensor, list[int]]:
        """Windows (batch, segment + 1), and the rows that begin a document."""
        (books, begun), (code, also) = (part.next_batch() for part in self._parts)
        return torch.cat([books, code]), begun + [row + self._half for row in also]

    def state(self) -> list[Any]:
        """Where they are."""
        return [part.state() for part in self._parts]

    def resume(self, state: list[Any]) -> None:
        """Goes on from a state."""
        for part, kept in zip(self._parts, state, strict=True):
            part.resume(kept)


class Adaptation:
    """One run: the network, its optimizer, and the step as a CUDA graph where there is a GPU."""

    def __init__(self, network: Network, streams: TwoStreams, options: argparse.Namespace, segment: int) -> None:
        self.network, self.streams, self.options = network, streams, options
        self.device = network.head.weight.device
        self.is_cuda = self.device.type == "cuda"
        self.windows = torch.zeros(options.batch, segment + 1, dtype=torch.int64, device=self.device)
        self.begun = torch.zeros(options.batch, dtype=torch.bool, device=self.device)
        self.sum = torch.zeros((), device=self.device)
        self.step = 0
        network.make_ring(options.batch, segment)
        named = network.trained()
        self.parameters = [each for _, each in named]
        self.peaks = [options.rate, options.rate, options.lora_rate]
        own = [(name, each) for name, each in named if name.startswith("memory.")]
        groups = [
            {"params": [p for _, p in own if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for _, p in own if p.dim() < 2], "weight_decay": 0.0},
            {"params": [p for name, p in named if name.startswith("lora.")], "weight_decay": 0.0},
        ]
        kept = [(group, peak) for group, peak in zip(groups, self.peaks, strict=True) if group["params"]]
        self.peaks = [peak for _, peak in kept]
        rates = [torch.tensor(0.0, device=self.device) for _ in kept]
        parameters = [group | {"lr": rate} for (group, _), rate in zip(kept, rates, strict=True)]
        extra = {"fused": True, "capturable": True} if self.is_cuda else {"fused": False, "foreach": False}
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), **extra)
        self.graph: Any = None

    def update(self) -> None:
        """Forward, backward and optimizer, on the buffers."""
        with autocast(self.device):
            loss = self.network.loss(self.windows, self.begun)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.graph is None)
        self.sum += loss.detach()

    def capture(self) -> None:
        """The step as one CUDA graph; eager where that fails."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.update()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.update()
        self.graph = graph
        self.forget()

    def forget(self) -> None:
        """Undoes what the steps before the first one left behind; in place, for the graph's sake."""
        self.sum.zero_()
        if self.network.ring is not None:
            self.network.ring.next.zero_()
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def set_rates(self, progress: float) -> None:
        """Cosine over the run, after a warm-up in steps."""
        shape = min(1.0, (self.step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"].fill_(peak * shape)

    def advance(self, progress: float) -> None:
        """Reads one segment of every row and learns from it."""
        windows, begun = self.streams.next_batch()
        self.windows.copy_(windows)
        flags = torch.zeros(len(self.begun), dtype=torch.bool)
        flags[begun] = True
        self.begun.copy_(flags, non_blocking=True)
        self.set_rates(progress)
        if self.graph is None:
            self.update()
        else:
            self.graph.replay()
        self.step += 1

    def state(self) -> dict[str, Any]:
        """What a later run goes on from; memories begin empty then."""
        return {
            "step": self.step,
            "parameters": [each.detach() for each in self.parameters],
            "optimizer": [self.optimizer.state[each] for each in self.parameters if each in self.optimizer.state],
            "streams": self.streams.state(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Takes up a state, in place."""
        if self.graph is None:
            self.set_rates(0.0)
            self.update()
            self.forget()
        self.step = state["step"]
        with torch.no_grad():
            for own, kept in zip(self.parameters, state["parameters"], strict=True):
                own.copy_(kept)
            mine = [self.optimizer.state[each] for each in self.parameters if each in self.optimizer.state]
            for own_state, kept_state in zip(mine, state["optimizer"], strict=True):
                for name, value in own_state.items():
                    value.copy_(kept_state[name])
        self.streams.resume(state["streams"])


def sample_states(network: Network, windows: Tensor) -> Tensor:
    """(n, hidden_size) states that enter the retrieval layer."""
    found: list[Tensor] = []

    def keep(number: int, hidden: Tensor) -> None:
        if number == network.config.retrieval_layer:
            found.append(hidden[:, 1:].flatten(0, 1).float())

    ring, network.ring = network.ring, None
    with torch.no_grad(), autocast(windows.device):
        run_layers(network.decoder, windows[:, :-1], keep)
    network.ring = ring
    return found[0]


def save(network: Network, out: Path, report: dict[str, Any]) -> None:
    """The adapter folder that `attach` loads, or for MT its weights; report.json beside it."""
    lora = network.model if network.spec.lora_rank else None
    if network.spec.kind == "memory":
        save_adapter(out, network.config, network.weights, lora_model=lora)
    else:
        out.mkdir(parents=True, exist_ok=True)
        if network.weights is not None:
            torch.save(network.weights.state_dict(), out / "mt.pt")
        if lora is not None:
            lora.save_pretrained(str(out / "lora"))
    (out / "report.json").write_text(json.dumps(report, indent=1))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains one variant and saves it."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM.from_pretrained(options.base, dtype=torch.float32).to(device)
    spec, segment = spec_of(options.variant, json.loads(options.shared), model.config)
    batch = max(2, options.batch * 512 // max(512, segment))
    options = argparse.Namespace(**(vars(options) | {"batch": batch}))
    segment = min(segment, options.max_segment)
    network = Network(model, spec)
    streams = TwoStreams(options.data, batch, segment, options.seed, device)
    initialise(network, sample_states(network, streams.next_batch()[0]))
    adaptation = Adaptation(network, streams, options, segment)
    checkpoint = options.out / "checkpoint.pt"
    options.out.mkdir(parents=True, exist_ok=True)
    if adaptation.is_cuda and not options.eager:
        adaptation.set_rates(1.0)
        try:
            adaptation.capture()
        except RuntimeError as error:
            print(f"no CUDA graph: {error}", flush=True)
            return run(argparse.Namespace(**(vars(options) | {"eager": True})))
    if options.resume and checkpoint.exists():
        adaptation.resume(torch.load(checkpoint, map_location=device, weights_only=True))
    report = train(adaptation, spec, options)
    save(network, options.out, report)
    return report


def train(adaptation: Adaptation, spec: NetworkSpec, options: argparse.Namespace) -> dict[str, Any]:
    """Until the steps, or the seconds, are over; the mean loss of each 50 steps."""
    begun, first, losses, saved_at = time.monotonic(), adaptation.step, [], time.monotonic()
    adaptation.sum.zero_()
    progress = 0.0
    while progress < 1.0:
        by_time = (time.monotonic() - begun) / options.seconds if options.seconds else 0.0
        by_steps = adaptation.step / options.steps if options.steps else 0.0
        progress = min(1.0, max(by_time, by_steps))
        adaptation.advance(progress)
        if adaptation.step % 50 == 0:
            losses.append(round(adaptation.sum.item() / 50, 4))
            adaptation.sum.zero_()
            print(f"step {adaptation.step} loss {losses[-1]} {time.monotonic() - begun:.1f} s", flush=True)
            if time.monotonic() - saved_at > 60:
                torch.save(adaptation.state(), options.out / "checkpoint.pt")
                saved_at = time.monotonic()
    seconds = time.monotonic() - begun
    return {
        "variant": options.variant,
        "kind": spec.kind,
        "layer": spec.config.retrieval_layer,
        "top_k": spec.config.top_k,
        "steps": adaptation.step,
        "seconds": round(seconds, 1),
        "steps_per_s": round((adaptation.step - first) / seconds, 2),
        "tokens": adaptation.step * adaptation.windows.shape[0] * (adaptation.windows.shape[1] - 1),
        "trained_parameters": sum(each.numel() for each in adaptation.parameters),
        "batch": adaptation.windows.shape[0],
        "segment": adaptation.windows.shape[1] - 1,
        "seed": options.seed,
        "rate": options.rate,
        "is_graph": adaptation.graph is not None,
        "losses": losses,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000, help="at most; 0: by time only")
    parser.add_argument("--seconds", type=float, default=0.0, help="at most; 0: by steps only")
    parser.add_argument("--batch", type=int, default=32, help="documents read at once")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--lora-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", default="{}", help="JSON: changes that all variants share")
    parser.add_argument("--max-segment", type=int, default=4096, help=argparse.SUPPRESS)
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--resume", action="store_true")
    return parser


def main() -> int:
    """Trains one variant, or several one after the other (names joined by commas)."""
    options = parser().parse_args()
    for name in options.variant.split(","):
        each = argparse.Namespace(**(vars(options) | {"variant": name, "out": options.out / name}))
        print(json.dumps(run(each)), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
