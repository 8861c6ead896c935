"""Pretraining of the demo's base model: a small Llama, from scratch, in a budget of minutes."""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from integration.training.disjoint import read_documents, running_stdlib, stdlib_texts
from integration.training.tokenizer import save
from integration.training.tokens import HeldOut, Windows, held_out, load

WARMUP_STEPS = 200
DECAY_RATIO = 0.4  # the last part of the run, where the rate falls to nothing
EVALUATIONS = 8
SAVE_SECONDS = 20  # what is left of the budget for the last evaluation and the files

Loss = Callable[[Tensor], Tensor]


def small_llama(vocab_size: int, is_tiny: bool) -> LlamaConfig:
    """The base model's shape: 6.85 million parameters; tiny, for a smoke run, 0.3 million."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64 if is_tiny else 256,
        intermediate_size=128 if is_tiny else 688,
        num_hidden_layers=2 if is_tiny else 8,
        num_attention_heads=2 if is_tiny else 8,
        num_key_value_heads=1 if is_tiny else 4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """(batch, length) ids to (batch, length, vocab) logits, causal.

    The model's own modules without its outer forward, whose mask would keep attention off the
    flash kernel when compiled.
    """
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits


def loss_of(model: LlamaForCausalLM) -> Loss:
    """The mean next-token loss in nats of windows (batch, length + 1), in bf16 where on a GPU."""
    is_cuda = next(model.parameters()).is_cuda

    def loss(windows: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=is_cuda):
            logits = logits_of(model, windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    return loss


def compiled(loss: Loss, windows: Tensor) -> tuple[Loss, bool]:
    """The loss compiled for this shape, tried once both ways; the loss itself where that fails."""
    try:
        fast: Loss = torch.compile(loss, dynamic=False)
        fast(windows).backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        tqdm.write(f"not compiled: {error}")
        return loss, False
    return fast, True


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=matrices[0].is_cuda)


@dataclass(slots=True, kw_only=True)
class Schedule:
    """The learning rate over a run bounded by `steps`, or by `seconds` where steps is 0.

    Warm-up in steps, then flat, then straight down to 0 over the last DECAY_RATIO of the run.
    """

    rate: float
    steps: int
    seconds: float
    warmup_steps: int = WARMUP_STEPS
    started: float = field(default_factory=time.monotonic)

    def progress(self, step: int) -> float:
        """How much of the run is over: 0 to 1."""
        elapsed = time.monotonic() - self.started
        return min(1.0, step / self.steps if self.steps else elapsed / self.seconds)

    def rate_at(self, step: int, progress: float) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.rate * warm * min(1.0, (1.0 - progress) / DECAY_RATIO)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, texts: dict[str, HeldOut], window: int) -> dict[str, float]:
    """Loss in nats a token of 512 evenly spaced windows of each text, and its bits a byte."""
    device, loss = next(model.parameters()).device, loss_of(model)
    reached = dict[str, float]()
    for name, text in texts.items():
        num_windows = min(512, text.ids.size // (window + 1))
        starts = np.linspace(0, text.ids.size - window - 1, num_windows).astype(np.int64)
        rows = text.ids[starts[:, None] + np.arange(window + 1)].astype(np.int64)
        on_device = torch.from_numpy(rows).to(device)
        parts = [on_device[place : place + 64] for place in range(0, num_windows, 64)]
        nats = sum(loss(part).item() * len(part) for part in parts) / num_windows
        reached[name] = round(nats, 4)
        reached[f"{name}_bits_per_byte"] = round(nats / math.log(2) / text.bytes_per_token, 4)
    return reached


@dataclass(slots=True, kw_only=True)
class Run:
    """One training run: what it trains, on what, how long, and how far it is."""

    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    windows: Windows
    schedule: Schedule
    log: TextIO
    step: int = 0

    def record(self, row: dict[str, float]) -> None:
        """One JSON line of the log."""
        self.log.write(json.dumps({"step": self.step, **row}) + "\n")
        self.log.flush()

    def checkpoint(self, path: Path) -> None:
        """Everything a later run goes on from."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": self.step, "draws": self.windows.generator.get_state()}, path)

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint at the full rate, with this run's whole budget."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.windows.generator.set_state(state["draws"])
        self.step = 0
        self.schedule.warmup_steps = 1

    def update(self, loss: Loss, windows: Tensor, rate: float) -> Tensor:
        """One step of the optimizer; the batch's loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        value = loss(windows)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return value.detach()


def train(run: Run, loss: Loss, texts: dict[str, HeldOut], options: argparse.Namespace) -> None:
    """Steps until the schedule ends; logs every 20 steps, evaluates EVALUATIONS times."""
    window, next_evaluation, is_saved = options.window, 1 / EVALUATIONS, False
    bar = tqdm(unit="tok", unit_scale=True, mininterval=5)
    while (progress := run.schedule.progress(run.step)) < 1:
        rate = run.schedule.rate_at(run.step, progress)
        batch = run.windows.draw(options.batch, window + 1, options.code_ratio)
        value = run.update(loss, batch, rate)
        bar.update(options.batch * window)
        if run.step % 20 == 0:
            # item() waits for the device, so that the clock never runs ahead of the work.
            row = {"loss": round(value.item(), 4), "rate": rate, "progress": round(progress, 4)}
            run.record({**row, "seconds": round(time.monotonic() - run.schedule.started, 1)})
            bar.set_postfix(loss=row["loss"])
        if progress >= next_evaluation:
            next_evaluation += 1 / EVALUATIONS
            run.record(evaluate(run.model, texts, window))
        if options.checkpoint and not is_saved and progress >= 1 - DECAY_RATIO:
            run.checkpoint(options.checkpoint)
            is_saved = True
    bar.close()


def load_texts(tokenizer: Tokenizer, options: argparse.Namespace) -> dict[str, HeldOut]:
    """The held-out texts: code, books, and the running interpreter's library."""
    code = read_documents(options.code / "code-validation.jsonl.xz")
    books = read_documents(options.books / "validation.jsonl.xz")
    return {
        "code": held_out(tokenizer, [document["text"] for document in code]),
        "books": held_out(tokenizer, [document["text"] for document in books]),
        "stdlib": held_out(tokenizer, list(stdlib_texts(running_stdlib()))),
    }


def commit() -> str:
    """The commit this runs from, '' outside a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip()


def save_model(run: Run, tokenizer: Tokenizer, folder: Path) -> None:
    """The model in float16 and its tokenizer, as transformers reads them."""
    run.model.to(torch.float16).save_pretrained(folder)
    save(tokenizer, folder)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", type=Path, default=Path(".train/corpus"))
    parser.add_argument("--books", type=Path, required=True, help="folder of the books' .jsonl.xz")
    parser.add_argument("--tokenizer", type=Path, default=Path(".train/tokenizer"))
    parser.add_argument("--cache", type=Path, default=Path(".train/tokens"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.5, help="whole run, loading included")
    parser.add_argument("--steps", type=int, default=0, help="a fixed number of steps instead")
    parser.add_argument("--batch", type=int, default=256, help="windows a step")
    parser.add_argument("--window", type=int, default=512, help="tokens a window")
    parser.add_argument("--code-ratio", type=float, default=0.75)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a model for smoke runs")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--checkpoint", type=Path, help="file written where the decay begins")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--commit", default=commit())
    return parser.parse_args()


def prepare(options: argparse.Namespace, tokenizer: Tokenizer, log: TextIO) -> tuple[Run, Loss, bool]:
    """The run, its loss and whether that is compiled; the schedule's clock has not started."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    code = load(tokenizer, options.code / "code-train.jsonl.xz", options.cache)
    books = load(tokenizer, options.books / "train.jsonl.xz", options.cache)
    model = LlamaForCausalLM(small_llama(tokenizer.get_vocab_size(), options.tiny)).to(device)
    run = Run(
        model=model,
        optimizer=optimizer_of(model, options.rate),
        windows=Windows(code, books, device, options.seed),
        schedule=Schedule(rate=options.rate, steps=options.steps, seconds=1.0),
        log=log,
    )
    run.record({"parameters": model.num_parameters(), "code_tokens": code.size, "books_tokens": books.size})
    loss = loss_of(model)
    if options.eager:
        return run, loss, False
    fast, is_compiled = compiled(loss, run.windows.draw(options.batch, options.window + 1, options.code_ratio))
    return run, fast, is_compiled


def summary(run: Run, options: argparse.Namespace, losses: dict[str, float]) -> dict[str, object]:
    """What train.json says of a finished run."""
    is_cuda = torch.cuda.is_available()
    return {
        "seed": options.seed,
        "steps": run.step,
        "tokens": run.step * options.batch * options.window,
        "tokens_per_s": round(run.step * options.batch * options.window / run.schedule.seconds),
        "parameters": run.model.num_parameters(),
        "batch": options.batch,
        "window": options.window,
        "code_ratio": options.code_ratio,
        "rate": options.rate,
        "losses": losses,
        "machine": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": options.commit,
    }


def main() -> int:
    """Trains, evaluates and saves a base model."""
    started, options = time.monotonic(), parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    with (options.out / "log.jsonl").open("w") as log:
        texts = load_texts(tokenizer, options)
        run, loss, is_compiled = prepare(options, tokenizer, log)
        if options.resume:
            run.resume(options.resume)
        run.record({"is_compiled": is_compiled, "ready_after_s": round(time.monotonic() - started, 1)})
        run.schedule.started = time.monotonic()
        run.schedule.seconds = max(1.0, started + options.minutes * 60 - SAVE_SECONDS - run.schedule.started)
        train(run, loss, texts, options)
        run.schedule.seconds = time.monotonic() - run.schedule.started
        losses = evaluate(run.model, texts, options.window)
        run.record(losses)
    (options.out / "train.json").write_text(json.dumps(summary(run, options, losses), indent=2) + "\n")
    save_model(run, tokenizer, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
