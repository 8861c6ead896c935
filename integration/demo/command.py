"""`memstore demo`: a real model reads a real long text through a memstore server of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from integration import arguments
from integration.adapter import Adapter, load_adapter
from integration.attach import attach
from integration.demo.figure import draw
from integration.demo.page import write_page
from integration.demo.reading import Reading, ReadMap, read
from integration.demo.report import Readings, Report, machine
from integration.demo.server import ServerDidNotStart, running_server
from integration.demo.text import OTHER_PACKAGES, READ_PACKAGES, Document, NoText, from_path, standard_library
from model_client import MemoryClient
from model_client.errors import MemstoreClientError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from integration.attach import AttachedMemory

WEIGHTS = Path(__file__).parent / "weights"
MINIMUM_TOKENS = 1024
MAX_CHARACTERS_A_TOKEN = 8
"""More than any text has on average under this tokenizer (about 3 are usual); what is beyond is not read at all."""

CALL_S = 10.0
"""What making, dropping and finding a memory may take."""

DEADLINE_S = 60.0
"""What a segment waits for its rows: here a late answer would not save time, it would spoil the figures."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 0, or 1 with a line on standard error that says what was wrong."""
    options = _parse(words)
    try:
        demo = Demo(options)
        with contextlib.ExitStack() as stack:
            report = demo.run(options.target or stack.enter_context(running_server()))
    except (NoText, ServerDidNotStart, OSError) as error:
        sys.stderr.write(f"memstore demo: {error}\n")
        return 1
    except MemstoreClientError as error:
        where = f"--target={options.target}" if options.target else "its own server"
        sys.stderr.write(f"memstore demo: {where}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    files = ", ".join(f"{options.out / name}" for name in ("report.json", "report.html", "report.png"))
    text = json.dumps(report.as_dict()) if options.json else "\n".join([*report.lines(), f"written: {files}"])
    sys.stdout.write(text + "\n")
    return 0


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="memstore demo", description=__doc__)
    parser.add_argument("--text", type=Path, help="file or folder to read (default: source of the standard library)")
    parser.add_argument("--other-text", type=Path, help="file or folder whose memory is the control")
    parser.add_argument(
        "--tokens", type=int, default=106_496, help="read at most this many tokens (default %(default)s)"
    )
    parser.add_argument("--capacity", type=arguments.count, help="entries that the memory holds (default: as trained)")
    parser.add_argument("--target", help="an existing server, host:port or unix:///path (default: start one)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-report"), help="folder of the report (default %(default)s)"
    )
    parser.add_argument(
        "--device", type=arguments.device, default="cpu", help="of the model: cpu, cuda, ... (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print report.json instead of a table")
    options = parser.parse_args(words)
    if options.tokens < MINIMUM_TOKENS:
        parser.error(f"--tokens: at least {MINIMUM_TOKENS}")
    return options


class Demo:
    """A model, its adapter and its texts: three passes over one text, and what they say. Raises NoText when made."""

    def __init__(self, options: argparse.Namespace) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.options = options
        self.tokenizer, base = load_model(WEIGHTS / "base", options.device)
        self.adapter = _with_capacity(load_adapter(WEIGHTS / "adapter", device=options.device), options.capacity)
        self.model = self.adapter.apply_lora(base)
        self.text, self.tokens = self._tokens(options.text, READ_PACKAGES, options.tokens)
        other = (options.other_text, OTHER_PACKAGES, max(self.adapter.config.capacity, MINIMUM_TOKENS))
        self.other_text, self.other_tokens = self._tokens(*other)
        self.read_map = ReadMap(len(self.tokens))

    def run(self, target: str) -> Report:
        """Reads the text without memory, with its own, and with the other document's; writes the report's files.

        target: address of the server. Raises MemstoreClientError where it cannot be used.
        """
        self.options.out.mkdir(parents=True, exist_ok=True)
        readings, transport, lost = self._readings(target)
        report = self._report(readings, transport, lost)
        report.write(self.options.out / "report.json")
        picture = self.options.out / "report.png"
        draw(readings, self.read_map, self.adapter.config.capacity, picture)
        write_page(report, readings, self.read_map, self._decode, picture, self.options.out / "report.html")
        return report

    def _readings(self, target: str) -> tuple[Readings, str, int]:
        with MemoryClient(target, timeout_s=CALL_S) as client:
            client.info()
            none = self._pass("without memory", self.tokens)
            with self._attached(client, "own") as memory:
                own = self._pass("with its own memory", self.tokens, memory, self.read_map)
                lost = memory.stats.steps_without_memory
                transport = client.transport  # as it is while sequences may be lent
            with self._attached(client, "other") as memory:
                self._pass("filling the other memory", self.other_tokens, memory)
                memory.read_only = True
                other = self._pass("with the other memory", self.tokens, memory)
                lost += memory.stats.steps_without_memory
        return Readings(none=none, memory=own, other=other), transport, lost

    @contextlib.contextmanager
    def _attached(self, client: MemoryClient, name: str) -> Iterator[AttachedMemory]:
        label = f"demo-{name}-{uuid.uuid4().hex[:8]}"
        config = replace(self.adapter.config, memory=label, deadline_s=DEADLINE_S)
        try:
            with attach(self.model, client, config, weights=self.adapter.weights) as memory:
                memory.is_tracing = True
                yield memory
        finally:
            client.drop_memory(label)

    def _pass(
        self, label: str, tokens: torch.Tensor, memory: AttachedMemory | None = None, read_map: ReadMap | None = None
    ) -> Reading:
        with tqdm(total=len(tokens) - 1, desc=f"{label:<26}", unit="tok", unit_scale=True, file=sys.stderr) as progress:
            return read(self.model, tokens, self.adapter.config.segment_length, progress.update, memory, read_map)

    def _report(self, readings: Readings, transport: str, lost: int) -> Report:
        config, num_tokens = self.adapter.config, len(self.tokens)
        num_bytes = len(self._decode(1, num_tokens).encode("utf-8"))
        return Report(
            text=self.text.name,
            other_text=self.other_text.name,
            tokens=num_tokens,
            bytes=num_bytes,
            perplexity_memory=readings.memory.perplexity,
            perplexity_none=readings.none.perplexity,
            perplexity_other_document=readings.other.perplexity,
            bits_per_byte_memory=readings.memory.bits_per_byte(num_bytes),
            bits_per_byte_none=readings.none.bits_per_byte(num_bytes),
            tokens_per_s=num_tokens / readings.memory.seconds,
            tokens_per_s_none=num_tokens / readings.none.seconds,
            retrieval_share=readings.memory.retrieval_seconds / readings.memory.seconds,
            transport=transport,
            steps_without_memory=lost,
            machine=machine(self.options.device),
            memory={name: getattr(config, name) for name in ("capacity", "dim", "top_k", "before", "after", "context")},
            model_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            memory_parameters=sum(parameter.numel() for parameter in self.adapter.weights.parameters()),
            lora_parameters=self.adapter.lora_parameters,
        )

    def _tokens(self, path: Path | None, packages: tuple[str, ...], limit: int) -> tuple[Document, torch.Tensor]:
        max_characters = MAX_CHARACTERS_A_TOKEN * limit
        document = from_path(path, max_characters) if path else standard_library(packages)
        ids = self.tokenizer(document.text[:max_characters], add_special_tokens=False)["input_ids"][:limit]
        if len(ids) < MINIMUM_TOKENS:
            raise NoText(f"{document.name}: {len(ids)} tokens, at least {MINIMUM_TOKENS} are needed")
        return document, torch.tensor(ids, dtype=torch.int64)

    @property
    def _decode(self) -> Callable[[int, int], str]:
        return lambda begin, end: str(self.tokenizer.decode(self.tokens[begin:end].tolist()))


def load_model(folder: Path, device: str) -> tuple[Any, torch.nn.Module]:
    """The tokenizer and the language model of a folder, in float32, for inference."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return tokenizer, model.to(device).eval()


def _with_capacity(adapter: Adapter, capacity: int | None) -> Adapter:
    return replace(adapter, config=replace(adapter.config, capacity=capacity)) if capacity else adapter
