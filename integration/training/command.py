"""`memstore train`: adapts a model of transformers to a memory, from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from integration.config import DTYPES, MemoryConfig
from integration.training.adapt import AdaptOptions, adapt
from integration.training.documents import Documents, load_documents

if TYPE_CHECKING:
    from collections.abc import Sequence

HELD_OUT_RATIO = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 on success, 2 on bad arguments."""
    options = _parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_float32_matmul_precision("high")
    model, tokenizer = _load(options, device)
    try:
        documents = load_documents(options.data, tokenizer, options.cache)
        if options.validation:
            held_out = load_documents(options.validation, tokenizer, options.cache)
        else:
            documents, held_out = _split(documents)
        config = MemoryConfig.for_model(model, **_config_changes(options))
        report = adapt(model, config, documents, held_out, options.out, _adapt_options(options), resume=options.resume)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"memstore train: {error}\n")
        return 2
    figures = report.as_dict()
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
    else:
        verdict = figures["verdict"]
        sys.stdout.write(f"{report.steps} steps in {report.seconds:.0f} s; adapter in {options.out}\n")
        sys.stdout.write("".join(f"  {name:<28} {value:.4f}\n" for name, value in verdict.items()))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="memstore train", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name of a causal language model")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="text files, .jsonl, .jsonl.xz, folders (one document each)"
    )
    parser.add_argument("--validation", type=Path, nargs="+", help="held-out data (default: a part of --data)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--cache", type=Path, help="folder for the data as token ids")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device", help="of the model (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_memory_arguments(parser.add_argument_group("memory"))
    _add_training_arguments(parser.add_argument_group("training"))
    return parser.parse_args(arguments)


def _add_memory_arguments(group: Any) -> None:
    group.add_argument("--memory", default="memory", help="name of the memory the adapter is for")
    group.add_argument("--retrieval-layer", type=int, help="default: three quarters up")
    group.add_argument("--attention-layers", type=int, nargs="+", help="default: all above the retrieval layer")
    group.add_argument("--dim", type=int, help="width of a key (default: a quarter of the hidden size)")
    group.add_argument("--num-heads", type=int, help="of the cache attention (default: the model's)")
    group.add_argument("--num-kv-heads", type=int)
    group.add_argument("--head-dim", type=int)
    group.add_argument("--top-k", type=int)
    group.add_argument("--before", type=int)
    group.add_argument("--after", type=int)
    group.add_argument("--context", type=int)
    group.add_argument("--capacity", type=int)
    group.add_argument("--dtype", choices=tuple(DTYPES), help="of the kept keys")


def _add_training_arguments(group: Any) -> None:
    defaults = AdaptOptions()
    group.add_argument("--steps", type=int, default=defaults.steps)
    group.add_argument("--minutes", type=float, default=defaults.minutes, help="wall time at most; 0: no limit")
    group.add_argument("--segment", type=int, default=defaults.segment)
    group.add_argument("--batch", type=int, default=defaults.batch)
    group.add_argument("--max-segments", type=int, default=defaults.max_segments)
    group.add_argument("--rate", type=float, default=defaults.rate)
    group.add_argument("--lora-rank", type=int, default=defaults.lora_rank)
    group.add_argument("--lora-rate", type=float, default=defaults.lora_rate)
    group.add_argument("--warmup", type=int, default=defaults.warmup)
    group.add_argument("--evaluations", type=int, default=defaults.evaluations)
    group.add_argument("--judge-rows", type=int, default=defaults.judge_rows)
    group.add_argument("--judge-segments", type=int, default=defaults.judge_segments)
    group.add_argument("--seed", type=int, default=defaults.seed)
    group.add_argument("--target", default=defaults.target, help="memory server (default: in this process)")


def _load(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    return model, tokenizer


def _config_changes(options: argparse.Namespace) -> dict[str, Any]:
    names: tuple[str, ...] = (
        "memory",
        "retrieval_layer",
        "attention_layers",
        "dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    )
    names += ("top_k", "before", "after", "context", "capacity", "dtype")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {**given, "segment_length": options.segment}


def _adapt_options(options: argparse.Namespace) -> AdaptOptions:
    names: tuple[str, ...] = (
        "steps",
        "minutes",
        "segment",
        "batch",
        "max_segments",
        "rate",
        "lora_rank",
        "lora_rate",
        "warmup",
    )
    names += ("evaluations", "judge_rows", "judge_segments", "seed", "target")
    return AdaptOptions(**{name: getattr(options, name) for name in names})


def _split(documents: Documents) -> tuple[Documents, Documents]:
    """The first documents, or the first part of the only one, and the held-out rest."""
    cut = int(len(documents.ids) * (1 - HELD_OUT_RATIO))
    splits = documents.splits
    before, after = splits[splits < cut], splits[splits > cut]
    return (
        Documents(documents.ids[:cut], np.append(before, cut)),
        Documents(documents.ids[cut:], np.append(0, after - cut)),
    )


if __name__ == "__main__":
    sys.exit(main())
