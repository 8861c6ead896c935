"""Pretrains the base that all variants share, from scratch, on books and code; on every GPU of the machine at once.

Resumable: a checkpoint is written every minute and at the end; --resume goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.data import load
from benchmarks.quality.network import fuse_norms, run_layers
from integration.training.pretrain import optimizer_of

DECAY_RATIO = 0.35
WARMUP = 150


@dataclass(slots=True, kw_only=True)
class Clock:
    """progress() runs from 0 to 1 over `seconds`, or over `steps` where that is not 0."""

    seconds: float
    steps: int = 0
    begun: float = 0.0
    step: int = 0

    def progress(self) -> float:
        """How much is over."""
        passed = self.step / self.steps if self.steps else (time.monotonic() - self.begun) / self.seconds
        return min(1.0, passed)


def base_config(vocab_size: int, hidden: int, layers: int, heads: int) -> LlamaConfig:
    """A Llama with as many key heads as query heads and tied embeddings: 29.4 M parameters at 512 x 8."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )


class RandomWindows:
    """Windows of all domains, each as often as the others, held on the device."""

    def __init__(self, parts: list[Any], device: torch.device, seed: int) -> None:
        """parts: ids of each domain, uint16 below 32,768."""
        self._parts = [torch.from_numpy(part.view("int16").copy()).to(device) for part in parts]
        self._generator = torch.Generator(device).manual_seed(seed)

    def draw(self, count: int, length: int) -> torch.Tensor:
        """(count, length) int64, count a multiple of the number of domains."""
        device, drawn = self._parts[0].device, []
        for part in self._parts:
            places = torch.rand(
                count // len(self._parts), device=device, dtype=torch.float64, generator=self._generator
            )
            starts = (places * (len(part) - length)).long()
            drawn.append(part[starts[:, None] + torch.arange(length, device=device)].long())
        return torch.cat(drawn)


def loss_of(model: LlamaForCausalLM, is_cuda: bool) -> Any:
    """Mean nats of windows (batch, length + 1)."""

    def loss(windows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=is_cuda):
            logits = model.lm_head(run_layers(model.model, windows[:, :-1]))
        return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    return loss


def reduce_gradients(model: nn.Module, world: int) -> None:
    """Means over all GPUs."""
    if world == 1:
        return
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    flat = torch.cat([each.flatten() for each in gradients])
    distributed.all_reduce(flat)
    flat /= world
    torch._foreach_copy_(
        gradients, [p.view_as(g) for p, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    )


def train(rank: int, world: int, options: argparse.Namespace) -> None:
    """One GPU's part."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
        distributed.init_process_group("nccl", rank=rank, world_size=world)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    vocabulary = len(json.loads((options.data / "token_bytes.json").read_text()))
    model = LlamaForCausalLM(base_config(vocabulary, options.hidden, options.layers, options.heads)).to(device)
    fuse_norms(model)
    parts = [load(options.data, domain, "train")[0].ids for domain in ("books", "code")]
    windows = RandomWindows(parts, device, options.seed * 100 + rank)
    optimizer = optimizer_of(model, options.rate)
    clock = Clock(seconds=options.seconds, steps=options.steps)
    if options.resume and (options.out / "checkpoint.pt").exists():
        state = torch.load(options.out / "checkpoint.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    loss = loss_of(model, is_cuda)
    fast = torch.compile(loss, dynamic=False) if is_cuda and not options.eager else loss
    fast(windows.draw(options.batch, options.window + 1)).backward()
    model.zero_grad()
    clock.begun = time.monotonic()
    log = (options.out / "log.jsonl").open("a") if rank == 0 else None
    saved_at = clock.begun
    while True:
        shared = torch.tensor(clock.progress(), device=device)
        if world > 1 and clock.step % 10 == 0:
            distributed.broadcast(shared, 0)
        if clock.step % 10 == 0:
            progress = shared.item()
            if progress >= 1.0:
                break
        rate = options.rate * min(1.0, (clock.step + 1) / WARMUP) * min(1.0, (1.0 - progress) / DECAY_RATIO + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = fast(windows.draw(options.batch, options.window + 1))
        value.backward()
        reduce_gradients(model, world)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        clock.step += 1
        if log and clock.step % 50 == 0:
            seconds = time.monotonic() - clock.begun
            tokens = clock.step * world * options.batch * options.window
            row = {"step": clock.step, "loss": round(value.item(), 4), "seconds": round(seconds, 1), "tokens": tokens}
            log.write(json.dumps(row) + "\n")
            log.flush()
            if time.monotonic() - saved_at > 60:
                torch.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, options.out / "checkpoint.pt"
                )
                saved_at = time.monotonic()
    if rank == 0:
        described = vars(options) | {"tokens": clock.step * world * options.batch * options.window, "gpus": world}
        described |= {"step": clock.step, "parameters": model.num_parameters(), "loss": round(value.item(), 4)}
        (options.out / "train.json").write_text(
            json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in described.items()}, indent=1)
        )
        model.float().save_pretrained(options.out)
    if world > 1:
        distributed.destroy_process_group()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of a time")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="windows a GPU and step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpus", type=int, default=0, help="0: all")
    parser.add_argument("--port", type=int, default=29517)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Trains on all GPUs, or on the CPU."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    world = options.gpus or max(1, torch.cuda.device_count())
    if world == 1:
        train(0, 1, options)
    else:
        torch.multiprocessing.spawn(train, (world, options), nprocs=world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
