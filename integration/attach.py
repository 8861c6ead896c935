"""AttachedMemory: a decoder model that reads and keeps its own past states, for as long as it is attached."""

from __future__ import annotations

import contextlib
import inspect
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

import torch

from integration.cache_watch import CacheWatch
from integration.carries import Carries
from integration.config import HIDDEN
from integration.errors import AttachError
from integration.families import find_decoder
from integration.forward import Answer, Forward
from integration.held import HeldRows, RowBatch
from integration.layout import TokenLayout
from integration.loops import DecodeLoops, Passing
from integration.recomputing import PendingForwards
from integration.sequences import BatchSequences
from integration.store import MemoryLink
from integration.trace import MemoryStats, ReadTrace
from integration.weights import MemoryWeights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from torch import nn

    from integration.config import MemoryConfig
    from integration.families import Decoder
    from model_client import MemoryClient

_attached: WeakSet[nn.Module] = WeakSet()


def attach(
    model: nn.Module,
    client: MemoryClient,
    config: MemoryConfig,
    weights: MemoryWeights | None = None,
    sequences: Sequence[str] | None = None,
) -> AttachedMemory:
    """Gives the model a memory within a `with` block; outside of it the model is what it was.

    weights: trained ones; untrained ones leave every output as it is. sequences: names of the rows of the batch; what
    the memory already holds under them is read on from. By default they are new and gone afterwards.
    Raises ConfigError, UnknownFamily, or AttachError where the model is attached already.
    """
    return AttachedMemory(model, client, config, weights, sequences)


class AttachedMemory:
    """The memory of one model. Made by `attach`; hooks live from `__enter__` to `__exit__`.

    weights: the trained part, a torch module. enabled: False makes every forward that of the bare model, bit by bit.
    read_only: True reads and appends nothing. is_tracing: True keeps `last_trace`. stats: counters.
    One thread at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        client: MemoryClient,
        config: MemoryConfig,
        weights: MemoryWeights | None,
        sequences: Sequence[str] | None,
    ) -> None:
        config.check_model(model)
        self.config = config
        self.weights = MemoryWeights.for_model(model, config) if weights is None else weights
        self.stats = MemoryStats()
        self.enabled = True
        self.read_only = False
        self.is_tracing = False
        self.last_trace: ReadTrace | None = None
        self._decoder: Decoder = find_decoder(model)
        self._parameters = tuple(inspect.signature(self._decoder.module.forward).parameters)
        self._client = client
        self._link: MemoryLink | None = None
        self._batch = BatchSequences(config.max_sequences)
        self._carries = Carries()
        self._held = HeldRows()
        self._watch = CacheWatch()
        self._passing = Passing(config, self.weights, self._held, self._watch, self._carries, self.stats)
        self._forward: Forward | None = None
        self._is_passing = False
        self._pending = PendingForwards()
        self._loops = DecodeLoops(self._passing, self._decoder, partial(self._send_held, is_fresh=False))
        self._handles: list[Any] = []
        if sequences is not None:
            self._batch.rename(sequences, is_new=False)

    def __enter__(self) -> Self:
        decoder = self._decoder
        if decoder.module in _attached:
            raise AttachError("this model has a memory attached already")
        self._link = MemoryLink(self._client, self.config, self.stats)
        _attached.add(decoder.module)
        entry = decoder.layers[self.config.retrieval_layer]
        self._handles = [
            decoder.module.register_forward_pre_hook(self._begin, with_kwargs=True),
            entry.register_forward_pre_hook(self._look_up, with_kwargs=True),
            decoder.module.register_forward_hook(self._end, always_call=True),
        ]
        for layer in self.config.attention_layers:
            hook = self._reader(layer)
            self._handles.append(decoder.attention(layer).register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes all hooks off; after success the rows that wait are appended and unnamed sequences released."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _attached.discard(self._decoder.module)
        self._forward = None
        try:
            if kind is None:
                self.flush()
        finally:
            self._loops.close()
            if self._batch.made_up and self._link is not None:
                self._link.release(tuple(sorted(self._batch.made_up)))

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained beside the model."""
        return self.weights.parameters()

    @property
    def sequences(self) -> tuple[str, ...]:
        """Names of the rows of the batch; empty before the first forward where none were given."""
        return self._batch.names

    def new_documents(self, names: Sequence[str] | None = None, rows: Sequence[int] | None = None) -> None:
        """Begins new documents, whose sequences are emptied: under these names, or under the ones in use.

        rows: only these rows of the batch begin anew. What waits to be appended is appended first.
        """
        self.flush()
        if names is not None:
            self._batch.rename(names, is_new=True)
            self._forget()
            return
        chosen = range(len(self.sequences)) if rows is None else rows
        self._batch.begin_anew(chosen)
        self._carries.forget_rows(self.sequences, chosen)

    def flush(self) -> None:
        """Appends what waits beside the key-value cache, and waits until it is done."""
        if self._link is not None:
            self._loops.leave()
            cache = self._watch.cache
            self._follow_crop(self._watch.cropped(cache))
            self._watch.note(cache)
            self._passing.last = None
            while any(self._held.counts):
                limit = self.config.segment_length
                self._append_held(self._link, tuple(min(count, limit) for count in self._held.counts))
            self._link.settle()

    @contextlib.contextmanager
    def reading(self, sources: Sequence[str]) -> Iterator[None]:
        """Within the block the rows of the batch read these sequences instead of their own, and append nothing."""
        before = self._batch.sources
        self._batch.sources = tuple(sources)
        try:
            yield
        finally:
            self._batch.sources = before

    @torch.inference_mode()
    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """Streams a long text (batch, length) into the memory, segment by segment, and predicts nothing.

        attention_mask: (batch, length), 0 for padding.
        """
        length = self.config.segment_length
        for begin in range(0, input_ids.shape[1], length):
            part = slice(begin, begin + length)
            mask = None if attention_mask is None else attention_mask[:, part]
            self._decoder.module(input_ids=input_ids[:, part], attention_mask=mask, use_cache=False)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes what the pass is, and sends off what has left the key-value cache."""
        self._forward, self._is_passing = None, True
        given = dict(zip(self._parameters, args, strict=False)) | kwargs if args else kwargs
        if self._loops.loop is not None:
            is_apart = not self.enabled or self.is_tracing or self._batch.sources is not None
            if not is_apart and self._loops.goes_on(module, given, keeps=not self.read_only):
                return
            self._loops.leave()
        if not self.enabled:
            self._watch.note(None)
            return
        states = given.get("input_ids") if given.get("inputs_embeds") is None else given.get("inputs_embeds")
        if states is None:
            return
        batch, length = states.shape[:2]
        if not self._batch.read:
            self._batch.make_up(batch)
            self._forget()
        self._batch.check(batch)
        past, use_cache = given.get("past_key_values"), given.get("use_cache")
        self._follow(past)
        wants_cache = (self._decoder.is_cache_default if use_cache is None else use_cache) and not module.training
        self._forward = Forward(
            layout=TokenLayout.of(batch, length, given.get("attention_mask")),
            is_cached=past is not None or bool(wants_cache),
            is_fresh=past is None or int(past.get_seq_length()) == 0,
            is_training=torch.is_grad_enabled() and self.weights.training,
            recomputes=self._decoder.recomputes,
        )
        if self._is_appending:
            self._send_held(self._forward.is_fresh)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Lets go of the pass, unless the backward pass will run its layers again."""
        forward, self._forward, self._is_passing = self._forward, None, False
        cache = getattr(output, "past_key_values", None)
        if self._loops.passing is not None and not self._loops.end(cache):
            self._watch.note(cache)
        if forward is None:
            return
        is_candidate = forward.is_cached and not forward.is_fresh and max(forward.layout.counts) > 1
        self._watch.note(cache, is_held=is_candidate)
        self._passing.last = forward if forward.is_cached else None
        if forward.recomputes:
            self._pending.add(forward, output)
        if (
            self._link is not None
            and self._batch.sources is None
            and not self.is_tracing
            and not any(self._batch.is_new)
        ):
            self._loops.enter(forward, self._link, self._batch.names, keeps=self._is_appending)

    def _pass_of(self, given: dict[str, Any]) -> Forward | None:
        """The pass that an attention runs for, first or again."""
        if self._is_passing:
            return self._forward
        try:
            return self._pending.find(given)
        except LookupError as error:
            raise AttachError(f"{error}: call backward after each forward, or do without checkpointing") from error

    def _follow(self, past: Any) -> None:
        """Does what was done to the key-value cache since the last pass. AttachError where that cannot be followed."""
        if self._watch.is_rearranged(past):
            raise AttachError(
                "the rows of the key-value cache were rearranged, as beam search does, and the memory cannot follow; "
                "use one beam, or set `enabled = False`"
            )
        self._follow_crop(self._watch.cropped(past))
        self._passing.last = None

    def _follow_crop(self, cropped: int) -> None:
        """Takes back the last tokens of the last pass."""
        if not cropped:
            return
        counts = () if self._passing.last is None else self._passing.last.layout.counts
        if self._passing.last is None or cropped > min(counts):
            raise AttachError(
                f"{cropped} tokens were cropped from the key-value cache, but the memory takes back at most those of "
                "the last pass, and before a flush; set `enabled = False`, or begin with another cache"
            )
        unwanted = (cropped,) * len(counts)
        if self._is_appending:
            self._held.drop_last(unwanted)
        self._carries.take_back(self._batch.read, self._passing.last, unwanted, self.config.context)

    @property
    def _is_appending(self) -> bool:
        return not self.read_only and self._batch.sources is None

    def _look_up(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins the retrieval for the states that enter the retrieval layer."""
        states, link = args[0] if args else kwargs["hidden_states"], self._link
        if self._loops.passing is not None:
            if self._loops.start(states):
                return
            self._forward = DecodeLoops.pass_of(len(self._batch.names))
        forward = self._forward
        if forward is None or forward.is_started or link is None:
            return
        hidden = forward.layout.pack(states.detach())
        with torch.no_grad():
            keys = self.weights.projection(hidden)
        forward.hidden, forward.keys = hidden, keys
        kept = hidden.to(torch.bfloat16) if self.config.training_payload else None
        rows = RowBatch(keys, kept, forward.layout.counts)
        names = self._batch.read
        forward.is_appending = self._is_appending and not forward.is_cached
        forward.until = time.perf_counter() + self.config.deadline_s
        forward.call = link.start(
            names,
            rows,
            array=self._array(forward),
            append=forward.is_appending,
            start_of_sequence=self._batch.is_new if self._is_appending else [False] * len(names),
        )
        if self._is_appending and forward.is_cached:
            self._held.add(rows)

    def _reader(self, layer: int) -> Any:
        """The hook that adds what a layer reads to the output of its self-attention."""
        attention = self.weights.cache_attention(layer)
        is_last = layer == self.config.attention_layers[-1]

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            loop = self._loops.passing
            if loop is not None:
                states = args[0] if args else kwargs["hidden_states"]
                if isinstance(output, tuple):
                    return (loop.read(layer, states, output[0]), *output[1:])
                return loop.read(layer, states, output)
            forward = self._pass_of(kwargs)
            if forward is None or not forward.is_started:
                return None
            if not forward.is_answered:
                forward.mark(kwargs)
            self._await(forward)
            retrieved = forward.retrieved(self.weights.projection)
            if retrieved is None:
                return None
            states = forward.layout.pack(args[0] if args else kwargs["hidden_states"])
            if self.is_tracing and is_last and forward.answer is not None:
                added, mass = attention.forward_with_mass(states, retrieved)
                self.last_trace = ReadTrace.of(forward.answer, forward.layout.counts, mass)
            else:
                added = attention(states, retrieved)
            cells = forward.layout.unpack(added)
            return (output[0] + cells, *output[1:]) if isinstance(output, tuple) else output + cells

        return read

    def _await(self, forward: Forward) -> None:
        if forward.is_answered:
            return
        forward.is_answered = True
        key = self._batch.read
        carry = None if forward.is_training else self._carries.pop(key)
        found = self._link.finish(forward.call, forward.until) if self._link and forward.call else None
        self.last_trace = None
        num_appended = sum(forward.layout.counts) if forward.is_appending else 0
        if found is None or found.hits is None:
            self.stats.steps_without_memory += 1
            self.stats.lost_rows += num_appended
            return
        self.stats.steps_with_memory += 1
        self.stats.appended_rows += num_appended
        if self._is_appending:
            self._batch.have_begun()
        forward.answer = Answer.of(found.hits, self._array(forward), forward.layout.counts, self.config.context, carry)
        if forward.answer.carry is not None and not forward.is_training:
            self._carries[key] = forward.answer.carry
            forward.found, forward.carry = (found.hits, carry) if forward.is_cached else (None, None)

    def _array(self, forward: Forward) -> str:
        return HIDDEN if forward.is_training and self.config.training_payload else "key"

    def _send_held(self, is_fresh: bool) -> MemoryLink | None:
        """Appends what the key-value cache no longer holds, and whole segments of what it holds too long."""
        link, length = self._link, self.config.segment_length
        while link is not None and any(count >= length for count in self._held.counts):
            self._append_held(link, tuple(length if count >= length else 0 for count in self._held.counts))
        if link is not None and is_fresh and any(self._held.counts):
            self._append_held(link, self._held.counts)
        return link

    def _append_held(self, link: MemoryLink, counts: tuple[int, ...]) -> None:
        link.append(self._batch.names, self._held.take(counts), self._batch.is_new)
        if any(self._batch.is_new) and link.settle():
            self._batch.have_begun()

    def _forget(self) -> None:
        """The rows of the batch are others: nothing that was found goes on."""
        self._carries.clear()
        self._loops.close()
