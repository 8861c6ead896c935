"""Adaptation: trains what a memory needs beside a frozen model, on documents that are read segment by segment."""

from __future__ import annotations

import json
import math
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import torch
from tqdm import tqdm

from integration.adapter import add_lora, save_adapter
from integration.attach import attach
from integration.families import find_decoder
from integration.training.documents import Streams
from integration.training.judge import Judge, Verdict, autocast, next_token_loss
from integration.weights import MemoryWeights
from model_client import MemoryClient

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from integration.attach import AttachedMemory
    from integration.config import MemoryConfig
    from integration.training.documents import Documents

DEADLINE_S = 120.0
"""What training waits for its rows: late rows would only waste a step."""

CALL_S = 30.0
"""What finding, making or dropping a memory may take."""

CHECKPOINT_FILE = "checkpoint.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptOptions:
    """How long and how fast to train.

    steps: at most so many; minutes: wall time at most, with its evaluations, 0 for no limit. The learning rate rises
    over `warmup` steps and falls to nothing by whichever limit comes first. batch: documents read at once.
    segment: tokens of each a step. max_segments: longer documents are cut. rate: learning rate of the new weights;
    lora_rate: of the LoRA weights. lora_rank: 0 for none. evaluations: how often the held-out documents are read.
    judge_rows, judge_segments: how much of them. fit_projection: begin from the model (MemoryWeights.fit). target:
    where the memory is.
    """

    steps: int = 4000
    minutes: float = 0.0
    batch: int = 32
    segment: int = 512
    max_segments: int = 256
    rate: float = 1e-3
    lora_rate: float = 5e-4
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    lora_rank: int = 0
    evaluations: int = 4
    judge_rows: int = 16
    judge_segments: int = 48
    checkpoint_minutes: float = 2.0
    log_every: int = 20
    fit_projection: bool = True
    target: str = ":memory:"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptReport:
    """What a training run came to. losses: mean training loss of each stretch of `log_every` steps."""

    steps: int
    seconds: float
    steps_per_s: float
    tokens: int
    parameters: int
    steps_without_memory: int
    verdict: Verdict | None
    losses: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        verdict = self.verdict.as_dict() if self.verdict else None
        return {**asdict(self), "verdict": verdict}


def adapt(
    model: nn.Module,
    config: MemoryConfig,
    documents: Documents,
    held_out: Documents | None,
    out: Path,
    options: AdaptOptions,
    *,
    resume: bool = False,
) -> AdaptReport:
    """Trains and saves an adapter in the folder `out`, with log.jsonl, report.json and checkpoint.pt beside it.

    The model is left frozen, in eval mode, and, with LoRA, wrapped by peft in place. held_out: for the evaluations.
    resume: go on from the checkpoint in `out`, where there is one; memories begin empty.
    Raises MemstoreClientError where the server is out of reach; later failures only cost their step.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    device = next(model.parameters()).device
    model.requires_grad_(False).eval()
    adapted = add_lora(model, options.lora_rank) if options.lora_rank else model
    with (
        MemoryClient(options.target, device=str(device), timeout_s=CALL_S) as client,
        (out / "log.jsonl").open("a" if resume else "w") as log,
    ):
        client.info()
        run = _Run(adapted, config, documents, held_out, out, options, client, log)
        if resume and (out / CHECKPOINT_FILE).exists():
            run.resume()
        elif options.fit_projection:
            run.fit_projection()
        report = run.train()
    (out / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    return report


class _Run:
    """One training run and its state."""

    def __init__(
        self,
        model: nn.Module,
        config: MemoryConfig,
        documents: Documents,
        held_out: Documents | None,
        out: Path,
        options: AdaptOptions,
        client: MemoryClient,
        log: TextIO,
    ) -> None:
        self.model, self.options, self.out = model, options, out
        self.client, self.log = client, log
        self.started = time.monotonic()
        self.device = next(model.parameters()).device
        self.weights = MemoryWeights.for_model(model, config, dtype=torch.float32).train()
        self.config = config
        self.streams = Streams(
            documents,
            batch=options.batch,
            segment=options.segment,
            max_segments=options.max_segments,
            seed=options.seed,
            device=self.device,
        )
        self.judge: Judge | None = None
        if held_out is not None:
            rows, segments = options.judge_rows, options.judge_segments
            self.judge = Judge(held_out, rows=rows, segments=segments, segment=options.segment)
        self.lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = self._optimizer()
        self.step = 0
        self.losses: list[float] = []
        self.judge_s = 0.0

    def fit_projection(self) -> None:
        """Begins from the states of the first documents and the model's own projections (MemoryWeights.fit)."""
        found: list[torch.Tensor] = []
        layer = find_decoder(self.model).layers[self.config.retrieval_layer]

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"]).detach()[:, 1:].float())

        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        windows, _ = self.streams.next_batch()
        with torch.no_grad(), autocast(self.device):
            self.model(input_ids=windows[:, :-1], use_cache=False)
        handle.remove()
        self.weights.fit(self.model, found[0].flatten(0, 1))

    def train(self) -> AdaptReport:
        """Trains until the schedule ends, evaluates and saves."""
        options = self.options
        memory = self._memory()
        bar = tqdm(total=options.steps or None, initial=self.step, unit="step", mininterval=2, desc="adapt")
        first_step, next_judge, saved_at = self.step, 1 / max(1, options.evaluations), time.monotonic()
        while self.progress() < 1.0:
            with memory:
                while (progress := self.progress()) < min(1.0, next_judge):
                    self._step(memory, progress, bar)
                    if time.monotonic() - saved_at > 60 * options.checkpoint_minutes:
                        self.checkpoint()
                        saved_at = time.monotonic()
            if options.evaluations and next_judge < 0.999:
                self._judge()
            next_judge += 1 / max(1, options.evaluations)
        bar.close()
        self.client.drop_memory(memory.config.memory)
        seconds = time.monotonic() - self.started
        trained_s = max(1e-9, seconds - self.judge_s)
        self._save()
        verdict = self._judge()
        return AdaptReport(
            steps=self.step,
            seconds=round(seconds, 2),
            steps_per_s=round((self.step - first_step) / trained_s, 3),
            tokens=self.step * options.batch * options.segment,
            parameters=sum(parameter.numel() for parameter in self._trained()),
            steps_without_memory=memory.stats.steps_without_memory,
            verdict=verdict,
            losses=self.losses,
        )

    def progress(self) -> float:
        """How much of the run is over, 0 to 1: of its steps or of its time, whichever is more."""
        options = self.options
        by_steps = self.step / options.steps if options.steps else 0.0
        by_time = (time.monotonic() - self.started) / (60 * options.minutes) if options.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def checkpoint(self) -> None:
        """Writes everything that a later run goes on from."""
        state = {
            "step": self.step,
            "weights": self.weights.state_dict(),
            "lora": [parameter.detach() for parameter in self.lora],
            "optimizer": self.optimizer.state_dict(),
            "streams": self.streams.state(),
            "losses": self.losses,
        }
        unfinished = self.out / f"{CHECKPOINT_FILE}.part"
        torch.save(state, unfinished)
        unfinished.replace(self.out / CHECKPOINT_FILE)

    def resume(self) -> None:
        """Takes up the checkpoint's state."""
        state = torch.load(self.out / CHECKPOINT_FILE, map_location=self.device, weights_only=True)
        self.weights.load_state_dict(state["weights"])
        with torch.no_grad():
            for parameter, kept in zip(self.lora, state["lora"], strict=True):
                parameter.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.streams.resume(state["streams"])
        self.step, self.losses = state["step"], state["losses"]

    def _memory(self) -> AttachedMemory:
        options = self.options
        config = self.config.with_changes(
            memory=f"adapt-{uuid.uuid4().hex[:12]}",
            max_sequences=options.batch,
            training_payload=True,
            deadline_s=DEADLINE_S,
        )
        names = [f"row-{row}" for row in range(options.batch)]
        self._sum = torch.zeros((), device=self.device)
        return attach(self.model, self.client, config, self.weights, sequences=names)

    def _step(self, memory: AttachedMemory, progress: float, bar: Any) -> None:
        windows, begun = self.streams.next_batch()
        if begun:
            memory.new_documents(rows=begun)
        rate = self._set_rate(progress)
        with autocast(self.device):
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = next_token_loss(logits, windows)
        if loss.requires_grad:  # not where its memory failed, and nothing but that is trained
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._trained(), self.options.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._sum += loss.detach()
        self.step += 1
        bar.update(1)
        if self.step % self.options.log_every == 0:
            mean = self._sum.item() / self.options.log_every
            self._sum.zero_()
            self.losses.append(round(mean, 4))
            bar.set_postfix(loss=f"{mean:.4f}")
            self._write(loss=round(mean, 4), rate=rate, without_memory=memory.stats.steps_without_memory)

    def _set_rate(self, progress: float) -> float:
        shape = min(1.0, (self.step + 1) / max(1, self.options.warmup)) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * shape
        return self.options.rate * shape

    def _optimizer(self) -> torch.optim.AdamW:
        options = self.options
        own = list(self.weights.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in own if p.dim() > 1], "weight_decay": options.weight_decay, "peak": options.rate},
            {"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0, "peak": options.rate},
        ]
        if self.lora:
            groups.append({"params": self.lora, "weight_decay": 0.0, "peak": options.lora_rate})
        return torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), fused=self.device.type == "cuda")

    def _trained(self) -> list[nn.Parameter]:
        return [*self.weights.parameters(), *self.lora]

    def _judge(self) -> Verdict | None:
        if self.judge is None:
            return None
        begin = time.monotonic()
        config = self.config.with_changes(deadline_s=DEADLINE_S)
        verdict = self.judge.judge(self.model, self.weights, self.client, config)
        self.judge_s += time.monotonic() - begin
        self._write(**verdict.as_dict())
        figures = (verdict.with_memory, verdict.without_memory, verdict.other_document)
        told = "perplexity {:.3f} with memory, {:.3f} without, {:.3f} with another document's".format(*figures)
        tqdm.write(f"step {self.step}: {told}", file=sys.stderr)
        return verdict

    def _save(self) -> None:
        lora_model = self.model if self.options.lora_rank else None
        save_adapter(self.out, self.config, self.weights, lora_model=lora_model)
        self.checkpoint()

    def _write(self, **figures: Any) -> None:
        row = {"step": self.step, "seconds": round(time.monotonic() - self.started, 2), **figures}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
