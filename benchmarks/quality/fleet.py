"""Trials: many trainings side by side on one GPU, each a CUDA graph that needs nothing of the host but its launch.

All data of a training is on the device and its order is planned before it begins, so that a step is one launch. Each
trial has a thread and a stream. Read on validation documents afterwards, by the same network.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.quality import data
from benchmarks.quality.adapt import MAX_SEGMENTS, WARMUP, sample_states, save
from benchmarks.quality.network import Network, Ring, initialise
from benchmarks.quality.planting import planted
from benchmarks.quality.variants import spec_of
from integration.adapter import load_adapter
from integration.training.documents import Documents, Streams
from integration.training.judge import autocast

if TYPE_CHECKING:
    from collections.abc import Callable

DOMAINS = ("books", "code")
PLANTED_BOOKS = 10
MAX_RESERVED = 90 << 30
AHEAD = 16  # launches that wait on the device at most


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training. changes: of its variant. spans: entries that the rows of a batch have, in turn. renamed: share of
    book documents whose capitalised words are exchanged. planted: books with planted facts. begin: folder of the adapter
    to go on from.
    """

    name: str
    variant: str = "ours"
    changes: dict[str, Any] = field(default_factory=dict)
    steps: int = 600
    batch: int = 32
    rate: float = 3e-3
    lora_rate: float = 5e-4
    seed: int = 0
    spans: tuple[int, ...] = ()
    renamed: float = 0.0
    planted: bool = False
    begin: str = ""


class Text:
    """Documents of both domains; ids: all of them on the device, code from `offset` on."""

    def __init__(self, documents: list[Documents], device: torch.device) -> None:
        self.documents, self.offset = documents, len(documents[0].ids)
        self.ids = torch.from_numpy(Documents.join(documents).ids.astype(np.int32)).to(device)


class Corpus:
    """Training and validation text on the device."""

    def __init__(self, folder: Path, device: torch.device, length: int) -> None:
        self.folder, self.device = folder, device
        plain = [data.load(folder, domain, "train")[0] for domain in DOMAINS]
        self._texts = {False: Text(plain, device)}
        self.held_out = [data.windows(folder, domain, "validation", length, 5) for domain in DOMAINS]
        self._plans: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.exchanges = self._exchanges(64)

    def text(self, is_planted: bool) -> Text:
        """The training text, with facts planted in some of its books if so."""
        if is_planted not in self._texts:
            books, code = self._texts[False].documents
            count = min(PLANTED_BOOKS, len(books))
            some = Documents(books.ids[: books.splits[count]], books.splits[: count + 1])
            words = json.loads((self.folder / "words.json").read_text())
            tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self._texts[True] = Text([planted(some, tokenizer, words["train"]), code], self.device)
        return self._texts[is_planted]

    def plan(self, steps: int, batch: int, segment: int, seed: int, is_planted: bool) -> tuple[Tensor, Tensor]:
        """Places and begun rows of every step, (steps, batch) int64 and bool; half books, half code."""
        key, text = (steps, batch, segment, seed, is_planted), self.text(is_planted)
        if key not in self._plans:
            parts = [
                Streams(
                    each, batch=batch // 2, segment=segment, max_segments=MAX_SEGMENTS * 512 // segment,
                    seed=seed, device=torch.device("cpu"),
                )
                for each in text.documents
            ]  # fmt: skip
            places = np.zeros((steps, batch), np.int64)
            begun = np.zeros((steps, batch), bool)
            for step in range(steps):
                for number, part in enumerate(parts):
                    first = number * (batch // 2)
                    found, new = part.next_places()
                    places[step, first : first + batch // 2] = np.array(found) + number * text.offset
                    begun[step, [first + row for row in new]] = True
            self._plans[key] = (torch.from_numpy(places).to(self.device), torch.from_numpy(begun).to(self.device))
        return self._plans[key]

    def _exchanges(self, count: int) -> Tensor:
        """(1 + count, vocabulary): the tokens themselves, then as many ways to exchange those that begin a name."""
        vocabulary = json.loads((self.folder / "tokenizer.json").read_text())["model"]["vocab"]
        names = sorted(
            n
            for token, n in vocabulary.items()
            if len(token) > 3 and token[0] == "Ġ" and token[1].isupper() and token[2:].islower()
        )
        rng, table = np.random.default_rng(0), np.tile(np.arange(max(vocabulary.values()) + 1), (count + 1, 1))
        for row in table[1:]:
            row[names] = rng.permutation(names)
        return torch.from_numpy(table).to(self.device)


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
        if trial.spans and self.network.ring is not None:
            self.network.ring.span = torch.tensor(
                [trial.spans[row % len(trial.spans)] for row in range(self.batch)], device=self.device
            )
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
        at = self.at[None]
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
        """The step as a graph; parameters are as before."""
        kept = [each.detach().clone() for each in self.parameters]
        for _ in range(2):
            self.update()
        torch.cuda.current_stream().synchronize()
        self.graph = captured(self.update)
        with torch.no_grad():
            for own, before in zip(self.parameters, kept, strict=True):
                own.copy_(before)
        self.forget()

    def run(self, until: float, notice: Callable[[int], None] | None = None) -> int:
        """Steps until they are done, or the clock is past `until`; gives how many were made.

        notice: told of every thousand.
        """
        events: list[Any] = []
        for step in range(self.trial.steps):
            if self.graph is None:
                self.update()
            else:
                self.graph.replay()
                event = torch.cuda.Event()
                event.record()
                events.append(event)
                if len(events) > AHEAD:
                    events.pop(0).synchronize()
            if notice is not None and step % 1000 == 999:
                notice(step + 1)
            if step % 50 == 49 and time.monotonic() > until:
                return step + 1
        return self.trial.steps

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
            "losses": [round(float(x), 4) for x in losses[: steps // 50 * 50].reshape(-1, 50).mean(axis=1)],
        }


class Fleet:
    """Threads that take trials from a list, best first, until the time is over."""

    def __init__(
        self, base: Path, corpus: Corpus, out: Path, log: Path, *, workers: int = 3, length: int = 65_536
    ) -> None:
        self.corpus, self.out, self.log, self.workers, self.length = corpus, out, log, workers, length
        self.template: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).to(corpus.device)
        self.found: dict[str, dict[str, Any]] = {}
        self._building, self._taking = threading.Lock(), threading.Lock()
        self.failures = 0

    def run(
        self, trials: list[Trial], until: float, capacities: tuple[int, ...] = (16_384,), keep: bool = False
    ) -> None:
        """Trains and reads as many as there is time for. keep: saves their weights."""
        waiting = list(trials)

        def work() -> None:
            while time.monotonic() < until:
                with self._taking:
                    if not waiting:
                        return
                    trial = waiting.pop(0)
                try:
                    self._one(trial, until, capacities, keep)
                except Exception:
                    traceback.print_exc()
                    self.failures += 1

        threads = [threading.Thread(target=work) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, trial: Trial, until: float, capacities: tuple[int, ...], keep: bool) -> None:
        begun = time.monotonic()
        with self._building:
            training = Training(trial, self.template, self.corpus)
            if training.stream is not None:
                training.stream.wait_stream(torch.cuda.current_stream())
        context = torch.cuda.stream(training.stream) if training.stream is not None else torch.enable_grad()
        with context:
            with self._building:
                if training.stream is not None:
                    training.capture()
                    training.stream.synchronize()
            built = time.monotonic()

            def notice(done: int) -> None:
                save(training.network, self.out / trial.name, training.report(done, time.monotonic() - built))

            steps = training.run(until, notice if keep else None)
            if training.stream is not None:
                training.stream.synchronize()
            seconds = time.monotonic() - built
            report = training.report(steps, seconds)
            if keep:
                save(training.network, self.out / trial.name, report)
            row = {"name": trial.name, "build_s": round(built - begun, 1)} | report
            for capacity in capacities:
                with self._building:
                    row[f"read_{capacity}"] = training.read(capacity, self.length)
            row["read_s"] = round(time.monotonic() - built - seconds, 1)
            if capacities:
                row |= {domain: float(np.mean(row[f"read_{capacities[0]}"][domain])) for domain in DOMAINS}
        self.found[trial.name] = row
        with self._taking, self.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
        baseline = self.found.get("lora", {})
        change = "".join(
            f" {100 * math.expm1(row[d] - baseline[d]):+.2f}%" for d in DOMAINS if d in baseline and d in row
        )
        print(
            f"{time.monotonic():.0f} {trial.name}: {steps} steps {report['steps_per_s']}/s build {row['build_s']} read "
            f"{row['read_s']} loss {report['losses'][-4:]} "
            f"books {row.get('books', 0):.4f} code {row.get('code', 0):.4f}{change}",
            flush=True,
        )
        with self._building:
            del training
            gc.collect()
            if self.corpus.device.type == "cuda" and torch.cuda.memory_reserved() > MAX_RESERVED:
                torch.cuda.empty_cache()  # waits for all that runs
