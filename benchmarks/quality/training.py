"""Training: one network, its optimizer and its data, and a step that needs nothing of the host but its launch."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.quality.network import Network, initialise, run_layers
from benchmarks.quality.ring import Ring
from benchmarks.quality.variants import spec_of
from integration.adapter import load_adapter, save_adapter
from integration.training.judge import autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM

    from benchmarks.quality.streams import Corpus

WARMUP = 100
REPORTED_STEPS = 50  # one loss for each so many
NOTICED_STEPS = 1000
AHEAD = 16  # launches that wait on the device at most


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training. changes: of its variant.

    renamed: share of book documents whose capitalised words are exchanged for one another. planted: books with planted
    facts. begin: folder of the adapter to go on from.
    """

    name: str
    variant: str = "ours"
    changes: dict[str, Any] = field(default_factory=dict)
    steps: int = 600
    batch: int = 32
    rate: float = 3e-3
    lora_rate: float = 5e-4
    seed: int = 0
    renamed: float = 0.0
    planted: bool = False
    begin: str = ""


def captured(step: Callable[[], None]) -> Any:
    """A graph of the current stream's work; waits for no other stream, as torch.cuda.graph does."""
    gc.collect()
    gc.disable()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        step()
    finally:
        graph.capture_end()
        gc.enable()
    return graph


class Training:
    """A trial under way: network, optimizer and the step as a graph."""

    def __init__(self, trial: Trial, template: LlamaForCausalLM, corpus: Corpus) -> None:
        self.trial, self.corpus, self.device = trial, corpus, corpus.device
        torch.manual_seed(trial.seed)
        self.spec, self.segment = spec_of(trial.variant, trial.changes, template.config)
        self.batch = max(2, trial.batch * 512 // max(512, self.segment))
        self.network = Network(copy.deepcopy(template), self.spec)
        self.ids = corpus.text(trial.planted).ids
        self.places, self.begun = corpus.plan(trial.steps, self.batch, self.segment, trial.seed, trial.planted)
        self.reach = torch.arange(self.segment + 1, device=self.device)
        initialise(self.network, sample_states(self.network, self.ids[self.places[0][:, None] + self.reach].long()))
        if trial.begin:
            self._go_on(Path(trial.begin))
        self.network.make_ring(self.batch, self.segment)
        self.picks = self._picks() if trial.renamed else None
        self.at = torch.zeros((), dtype=torch.int64, device=self.device)
        self.losses = torch.zeros(trial.steps, device=self.device)
        self._optimizer()
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.graph: Any = None

    def _go_on(self, folder: Path) -> None:
        from peft import set_peft_model_state_dict

        if self.network.has_memory:
            self.network.weights.load_state_dict(
                load_adapter(folder, device=self.device, dtype=torch.float32).weights.state_dict()
            )
        set_peft_model_state_dict(self.network.model, load_file(folder / "lora" / "adapter_model.safetensors"))

    def _picks(self) -> Tensor:
        """(steps, batch): which exchange each row's document has; 0 for none."""
        rng, begun = np.random.default_rng(1), self.begun.cpu().numpy()
        picks = np.zeros(begun.shape, np.int64)
        now = np.zeros(self.batch, np.int64)
        for step, new in enumerate(begun):
            for row in np.flatnonzero(new[: self.batch // 2]):
                is_renamed = rng.random() < self.trial.renamed
                now[row] = rng.integers(1, len(self.corpus.exchanges)) if is_renamed else 0
            picks[step] = now
        return torch.from_numpy(picks).to(self.device)

    def _optimizer(self) -> None:
        trial, named = self.trial, self.network.trained()
        self.parameters = [each for _, each in named]
        own = [(name, each) for name, each in named if name.startswith("memory.")]
        groups = [
            ([p for _, p in own if p.dim() > 1], 0.01, trial.rate),
            ([p for _, p in own if p.dim() < 2], 0.0, trial.rate),
            ([p for name, p in named if name.startswith("lora.")], 0.0, trial.lora_rate),
        ]
        groups = [group for group in groups if group[0]]
        steps = np.arange(trial.steps)
        shape = np.minimum(1.0, (steps + 1) / WARMUP) * 0.5 * (1 + np.cos(math.pi * (steps + 1) / trial.steps))
        self.rates = torch.tensor(np.stack([shape * peak for _, _, peak in groups]), dtype=torch.float32).to(
            self.device
        )
        self.lrs = [torch.tensor(0.0, device=self.device) for _ in groups]
        given = [
            {"params": params, "weight_decay": decay, "lr": rate}
            for (params, decay, _), rate in zip(groups, self.lrs, strict=True)
        ]
        is_cuda = self.device.type == "cuda"
        extra = {"fused": True, "capturable": True} if is_cuda else {"fused": False, "foreach": False}
        self.optimizer = torch.optim.AdamW(given, betas=(0.9, 0.95), **extra)

    def update(self) -> None:
        """One step, all of it on the device."""
        at = self.at.clamp_max(self.trial.steps - 1)[None]  # warming goes beyond a plan of one step
        for number, rate in enumerate(self.lrs):
            rate.copy_(self.rates[number].index_select(0, at)[0])
        windows = self.ids[self.places.index_select(0, at)[0][:, None] + self.reach].long()
        if self.picks is not None:
            windows = self.corpus.exchanges[self.picks.index_select(0, at)[0][:, None], windows]
        with autocast(self.device):
            loss = self.network.loss(windows, self.begun.index_select(0, at)[0])
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.index_copy_(0, at, loss.detach()[None])
        self.at += 1

    def forget(self) -> None:
        """Undoes what warming left behind, in place."""
        self.at.zero_()
        if self.network.ring is not None:
            self.network.ring.next.zero_()
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def capture(self) -> None:
        """The step as a graph where there is a GPU; parameters are as before."""
        if self.stream is None:
            return
        kept = [each.detach().clone() for each in self.parameters]
        for _ in range(2):
            self.update()
        torch.cuda.current_stream().synchronize()
        self.graph = captured(self.update)
        with torch.no_grad():
            for own, before in zip(self.parameters, kept, strict=True):
                own.copy_(before)
        self.forget()

    def on_its_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Where a training runs: what is on the default stream by now comes before it."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def run(self, until: float, folder: Path | None = None) -> dict[str, Any]:
        """Steps until they are done, or the clock is past `until`; gives the report.

        folder: for weights; those on the way go to one beside it.
        """
        events: list[Any] = []
        begun, made = time.monotonic(), self.trial.steps
        for step in range(1, self.trial.steps + 1):
            if self.graph is None:
                self.update()
            else:
                self.graph.replay()
                events.append(torch.cuda.Event())
                events[-1].record()
                if len(events) > AHEAD:
                    events.pop(0).synchronize()
            if folder is not None and step % NOTICED_STEPS == 0 and step < self.trial.steps:
                save(
                    self.network,
                    folder.with_name(f"{folder.name}-partial"),
                    self.report(step, time.monotonic() - begun),
                )
            if step % REPORTED_STEPS == 0 and time.monotonic() > until:
                made = step
                break
        if self.stream is not None:
            self.stream.synchronize()
        report = self.report(made, time.monotonic() - begun)
        if folder is not None:
            save(self.network, folder, report)
        return report

    def close(self) -> None:
        """Lets go of what is on the device."""
        self.graph = self.network = self.optimizer = None
        self.parameters = []

    @torch.no_grad()
    def read(self, capacity: int, length: int) -> dict[str, list[float]]:
        """Mean nats of each validation document, by domain; segments of 512."""
        ids = torch.from_numpy(np.concatenate([each.ids for each in self.corpus.held_out])).to(self.device)
        counts = [len(each.ids) for each in self.corpus.held_out]
        segment, network = self.segment, self.network
        length = min(length, ids.shape[1] - 1) // segment * segment
        kept = network.ring
        network.ring = None
        if kept is not None:
            network.make_ring(len(ids), segment)
            names = ("hidden",) if network.has_memory else ("key", "value")
            widths = {name: getattr(kept, name).shape[2:] for name in names}
            network.ring = Ring(len(ids), capacity, segment, widths, device=self.device)
        reach = torch.arange(segment + 1, device=self.device)
        at = torch.zeros((), dtype=torch.int64, device=self.device)
        out = torch.zeros(length // segment, len(ids), device=self.device)

        def step() -> None:
            with autocast(self.device):
                nats = network.losses(ids[:, at * segment + reach])
            out.index_copy_(0, at[None], nats.mean(dim=1)[None])
            at.add_(1)

        if self.graph is None:
            for _ in range(length // segment):
                step()
        else:
            step()
            graph = captured(step)
            at.zero_()
            if network.ring is not None:
                network.ring.next.zero_()
            for _ in range(length // segment):
                graph.replay()
        means = out.mean(dim=0).cpu().numpy()
        network.ring = kept
        return {
            "books": [round(float(x), 5) for x in means[: counts[0]]],
            "code": [round(float(x), 5) for x in means[counts[0] :]],
        }

    def report(self, steps: int, seconds: float) -> dict[str, Any]:
        """What `adapt` writes beside weights."""
        losses = self.losses[:steps].cpu().numpy()
        return {
            "variant": self.trial.name,
            "kind": self.spec.kind,
            "init": self.spec.init,
            "layer": self.spec.config.retrieval_layer,
            "top_k": self.spec.config.top_k,
            "steps": steps,
            "seconds": round(seconds, 1),
            "steps_per_s": round(steps / max(seconds, 1e-9), 2),
            "tokens": steps * self.batch * self.segment,
            "trained_parameters": sum(each.numel() for each in self.parameters),
            "batch": self.batch,
            "segment": self.segment,
            "seed": self.trial.seed,
            "rate": self.trial.rate,
            "lora_rate": self.trial.lora_rate,
            "trial": asdict(self.trial),
            "is_graph": self.graph is not None,
            "losses": [
                round(float(x), 4)
                for x in losses[: steps // REPORTED_STEPS * REPORTED_STEPS].reshape(-1, REPORTED_STEPS).mean(axis=1)
            ],
        }


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
            torch.save(network.weights.state_dict(), out / f"{network.spec.kind}.pt")
        if lora is not None:
            lora.save_pretrained(str(out / "lora"))
    (out / "report.json").write_text(json.dumps(report, indent=1))
