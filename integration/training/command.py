"""`memstore train`: adapts a model of transformers to a memory, from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from integration import arguments
from integration.config import DTYPES, MemoryConfig
from integration.training.adapt import CHECKPOINT_FILE, AdaptOptions, adapt
from integration.training.documents import Documents, load_documents
from model_client.errors import MemstoreClientError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from integration.training.adapt import AdaptReport

HELD_OUT_RATIO = 0.05

ADAPT_HELP = {
    "steps": "steps at most; 0: no limit but --minutes",
    "minutes": "wall time at most, evaluations included; 0: no limit",
    "segment": "tokens of a document that are read in one step",
    "batch": "documents that are read at once",
    "max_segments": "longer documents are cut into parts of so many segments",
    "rate": "learning rate of the memory weights",
    "lora_rank": "train LoRA of this rank as well; 0: none",
    "lora_rate": "learning rate of the LoRA weights",
    "warmup": "steps over which the learning rate rises",
    "evaluations": "how often the held-out documents are read",
    "judge_rows": "held-out documents that are read",
    "judge_segments": "segments of each",
    "seed": "of the order of the documents and of the weights",
    "target": "memory server",
}
COUNTS = ("segment", "batch", "max_segments", "judge_rows", "judge_segments")
MEMORY_HELP = {
    "top_k": "hits a token",
    "before": "neighbours given with each hit, before it",
    "after": "neighbours given with each hit, after it",
    "context": "a token reads its own hits and those of so many tokens less one before it",
    "capacity": "entries of one document that are kept",
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; 0 on success, 1 for a failure and 2 for bad arguments, each with a line on standard error."""
    options = _parse(words)
    torch.set_float32_matmul_precision("high")
    try:
        report = _train(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"memstore train: {error}\n")
        return 1
    except MemstoreClientError as error:
        sys.stderr.write(f"memstore train: --target={options.target}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    figures = report.as_dict()
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
    else:
        verdict = figures["verdict"]
        sys.stdout.write(f"{report.steps} steps in {report.seconds:.0f} s; adapter in {options.out}\n")
        sys.stdout.write("".join(f"  {name:<28} {value:.4f}\n" for name, value in verdict.items()))
    return 0


def _train(options: argparse.Namespace) -> AdaptReport:
    for path in (*options.data, *(options.validation or ())):
        if not path.exists():  # told before a model is loaded, for which there may be much to wait
            raise FileNotFoundError(f"{path}: no such file or folder")
    model, tokenizer = _load(options)
    documents = load_documents(options.data, tokenizer, options.cache)
    if options.validation:
        held_out = load_documents(options.validation, tokenizer, options.cache)
    else:
        documents, held_out = _split(documents, options.segment)
    if options.resume and not (options.out / CHECKPOINT_FILE).exists():
        sys.stderr.write(f"memstore train: no checkpoint in {options.out}, training begins anew\n")
    config = MemoryConfig.for_model(model, **_config_changes(options))
    return adapt(model, config, documents, held_out, options.out, _adapt_options(options), resume=options.resume)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="memstore train", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name of a causal language model")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="text files, .jsonl, .jsonl.xz, folders (one document each)"
    )
    parser.add_argument(
        "--validation",
        type=Path,
        nargs="+",
        help=f"held-out data, two documents or more (default: the last {HELD_OUT_RATIO:.0%}% of --data)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--cache", type=Path, help="folder for the data as token ids (default: none)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=arguments.device, default=default_device, help="of the model (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_memory_arguments(parser.add_argument_group("memory"))
    _add_training_arguments(parser.add_argument_group("training"))
    options = parser.parse_args(words)
    for name in ("steps", "minutes"):
        if not getattr(options, name) >= 0:
            parser.error(f"--{name}: 0 or more")
    if not options.steps and not options.minutes:
        parser.error("--steps 0 needs --minutes: nothing would end the training")
    return options


def _add_memory_arguments(group: Any) -> None:
    defaults = {field.name: field.default for field in fields(MemoryConfig)}
    group.add_argument("--memory", default="memory", help="name of the memory the adapter is for (default: memory)")
    group.add_argument("--retrieval-layer", type=int, help="default: three quarters up")
    group.add_argument("--attention-layers", type=int, nargs="+", help="default: all above the retrieval layer")
    group.add_argument("--dim", type=arguments.count, help="width of a key (default: a quarter of the hidden size)")
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        group.add_argument(_flag(name), type=arguments.count, help="of the cache attention (default: the model's)")
    for name, text in MEMORY_HELP.items():
        group.add_argument(_flag(name), type=int, help=f"{text} (default: {defaults[name]})")
    group.add_argument("--dtype", choices=tuple(DTYPES), help=f"of the kept keys (default: {defaults['dtype']})")


def _add_training_arguments(group: Any) -> None:
    defaults = AdaptOptions()
    for name, text in ADAPT_HELP.items():
        default = getattr(defaults, name)
        kind = arguments.count if name in COUNTS else type(default)
        group.add_argument(_flag(name), type=kind, default=default, help=f"{text} (default: {default})")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.model.startswith(("/", ".", "~")) and not Path(options.model).is_dir():
        raise ValueError(f"--model={options.model}: no such folder")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device)
    return model, tokenizer


def _config_changes(options: argparse.Namespace) -> dict[str, Any]:
    names = ["memory", "retrieval_layer", "attention_layers", "dim", "num_heads", "num_kv_heads", "head_dim", "dtype"]
    given = {name: getattr(options, name) for name in (*names, *MEMORY_HELP) if getattr(options, name) is not None}
    return {**given, "segment_length": options.segment}


def _adapt_options(options: argparse.Namespace) -> AdaptOptions:
    return AdaptOptions(**{name: getattr(options, name) for name in ADAPT_HELP})


def _split(documents: Documents, segment: int) -> tuple[Documents, Documents]:
    """The first documents, or the first part of the only one, and the held-out rest.

    Raises ValueError where the rest has not two documents, or parts of documents, of two segments.
    """
    cut = int(len(documents.ids) * (1 - HELD_OUT_RATIO))
    splits = documents.splits
    before, after = splits[splits < cut], splits[splits > cut]
    held_out = Documents(documents.ids[cut:], np.append(0, after - cut))
    if len(held_out.spans(2 * segment + 1, 2 * segment + 1)) < 2:
        needed = f"two documents of {2 * segment + 1} tokens or more are needed to judge by"
        given = f"the last {HELD_OUT_RATIO:.0%} of --data are {len(held_out.ids)} tokens"
        raise ValueError(f"{needed}, and {given}; give documents that are held out by --validation")
    return Documents(documents.ids[:cut], np.append(before, cut)), held_out


if __name__ == "__main__":
    sys.exit(main())
