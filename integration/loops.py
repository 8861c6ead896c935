"""DecodeLoops: the decode loops of one attached model, when its passes go by one of them, and when they leave it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from integration.decode import DecodeLoop, EngineAtWork
from integration.forward import Forward
from integration.layout import TokenLayout
from integration.recorded import CAPTURE_ERRORS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from integration.cache_watch import CacheWatch
    from integration.carries import Carries
    from integration.config import MemoryConfig
    from integration.families import Decoder
    from integration.held import HeldRows
    from integration.store import MemoryLink
    from integration.trace import MemoryStats
    from integration.weights import MemoryWeights
    from model_client.cache_attention import Carry

DEVICES = {"cuda"}
"""Types of device on which there are loops: on the host nothing is gained by them."""

MOST_PASSES_BETWEEN = 64
"""Passes after which an engine that could not do it is asked again, at the latest."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Passing:
    """What the passes of a model share: what waits, what its cache was, and what the tokens before have found.

    last: the last pass, for as long as its tokens can be taken back.
    """

    config: MemoryConfig
    weights: MemoryWeights
    held: HeldRows
    watch: CacheWatch
    carries: Carries
    stats: MemoryStats
    last: Forward | None = None


class DecodeLoops:
    """See above. loop: that which the next pass may be one of. passing: that which the pass under way is one of."""

    def __init__(self, passing: Passing, decoder: Decoder, send: Callable[[], MemoryLink | None]) -> None:
        """send: appends what has waited long enough in the background, and says by which link."""
        self.loop: DecodeLoop | None = None
        self.passing: DecodeLoop | None = None
        self._send = send
        self._sent: MemoryLink | None = None
        self._is_started = False
        self._passing = passing
        self._decoder = decoder
        self._loops: dict[tuple[tuple[str, ...], bool], DecodeLoop] = {}
        self._names: tuple[str, ...] = ()
        self._room = 0
        self._is_able = True
        self._num_until_asked = 1
        self._num_between = 1

    def goes_on(self, module: nn.Module, given: dict[str, Any], keeps: bool) -> bool:
        """Whether a pass is the next one of the loop, which is left otherwise.

        Where it is, rows that have waited long enough are sent off. Raises ValueError on a mask of another form than is
        needed.
        """
        if self.loop is None or not self._is_next(module, given, keeps):
            self.leave()
            return False
        self.passing, self._is_started, self._passing.last = self.loop, False, None
        if keeps and self.loop.num_kept >= self._room:
            self._hold_kept(self.loop)
            self._sent = self._send()
            self._make_room()
        return True

    def start(self, states: torch.Tensor) -> bool:
        """Begins the retrieval of a pass, which sees all that was sent; False where the loop cannot, and is left."""
        loop = self.passing
        if loop is None or self._is_started:
            return self._is_started
        if self._sent is not None:
            self._sent.settle()
            self._sent = None
        if not loop.start(states):
            self.passing = None
            self.leave()
            self._passing.last = None
            return False
        self._passing.stats.steps_with_memory += 1
        self._is_started = True
        return True

    def end(self, cache: Any) -> bool:
        """The end of a pass; False where the cache was not seen to grow by it, and the loop is left."""
        self.passing = None
        if self._passing.watch.note_next(cache):
            return True
        self.leave()
        return False

    def leave(self) -> None:
        """What comes next is no pass of the loop."""
        loop, self.loop = self.loop, None
        if loop is None or not loop.num_passes:
            return
        if loop.num_passes > MOST_PASSES_BETWEEN:
            self._num_between = 1
        self._hold_kept(loop)
        carry = loop.carry()
        if carry is not None:
            self._passing.carries[self._names] = carry
        self._passing.last = self.pass_of(loop.num_sequences, loop.carry(before_last=True))

    @staticmethod
    def pass_of(num_sequences: int, carry: Carry | None = None) -> Forward:
        """One token of each sequence, beside others in the cache."""
        layout = TokenLayout(num_sequences, 1, (1,) * num_sequences)
        return Forward(layout=layout, is_cached=True, is_fresh=False, is_training=False, recomputes=False, carry=carry)

    def enter(self, forward: Forward, link: MemoryLink, names: tuple[str, ...], keeps: bool) -> None:
        """After a pass: what comes next may be a pass of a loop like it, which is made where there is none yet."""
        self.loop = self._loop_like(forward, link, names, keeps)
        if self.loop is not None:
            self._names = names
            self.loop.enter(self._passing.carries.get(names))
            self._make_room()

    def close(self) -> None:
        """Lets go of all loops, once the GPU is done with them."""
        self.loop = self.passing = None
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()

    def _is_next(self, module: nn.Module, given: dict[str, Any], keeps: bool) -> bool:
        loop, cache = self.loop, given.get("past_key_values")
        states = given.get("input_ids")
        if states is None:
            states = given.get("inputs_embeds")
        if loop is None or states is None or loop.keeps != keeps or not _is_plain(module):
            return False
        shape, mask = states.shape, given.get("attention_mask")
        if shape[0] != loop.num_sequences or shape[1] != 1:
            return False
        if mask is not None and TokenLayout.of(loop.num_sequences, 1, mask).places is not None:
            return False
        return self._passing.watch.takes_up(cache)

    def _hold_kept(self, loop: DecodeLoop) -> None:
        """Puts the rows of the loop's passes to those that wait."""
        rows = loop.take_kept()
        if rows is not None:
            self._passing.held.add(rows)

    def _make_room(self) -> None:
        """As many rows may wait from now on as are not waiting already."""
        waiting = max(self._passing.held.counts, default=0)
        self._room = self._passing.config.segment_length - waiting

    def _loop_like(self, forward: Forward, link: MemoryLink, names: tuple[str, ...], keeps: bool) -> DecodeLoop | None:
        if not self._suits(forward):
            return None
        loop = self._loops.get((names, keeps))
        if loop is not None and loop.lives and loop.is_current:
            return loop
        self._num_until_asked -= 1
        if self._num_until_asked > 0:
            return None
        self._num_until_asked = self._num_between
        self._num_between = min(2 * self._num_between, MOST_PASSES_BETWEEN)
        self.close()
        loop = self._made(forward, link, names, keeps)
        if loop is not None:
            self._loops[names, keeps] = loop
        return loop

    def _made(self, forward: Forward, link: MemoryLink, names: tuple[str, ...], keeps: bool) -> DecodeLoop | None:
        """A new loop, None where there can be none; then it is said once, unless it is the engine that is elsewhere."""
        config, weights, hidden, keys = self._passing.config, self._passing.weights, forward.hidden, forward.keys
        modules = [weights, *(self._decoder.attention(layer) for layer in config.attention_layers)]
        if (
            hidden is None
            or keys is None
            or {each.device for every in modules for each in every.parameters()} != {hidden.device}
        ):
            self._is_able = False
            return None
        standing = link.stand(names, keys)
        if standing is None:
            return None
        try:
            return DecodeLoop(weights, config, standing, hidden[:, None], keeps)
        except EngineAtWork:
            return None
        except RuntimeError as error:  # of which those of torch are kinds
            if getattr(error, "error_code", None) not in CAPTURE_ERRORS:
                self._is_able = False
                _log.warning("decoding goes the longer way: %s", error)
            return None

    def _suits(self, forward: Forward) -> bool:
        """Whether the pass was one that a loop could go on from."""
        layout, watch = forward.layout, self._passing.watch
        is_step = layout.length == 1 and layout.places is None and forward.is_cached and not forward.is_fresh
        if not (self._is_able and is_step) or forward.answer is None or self._passing.config.training_payload:
            return False
        device = forward.answer.rows.device
        is_on = device.type in DEVICES and _is_plain(self._decoder.module)
        return is_on and watch.is_as_left(watch.cache)


def _is_plain(module: nn.Module) -> bool:
    """Whether a forward wants no gradients and computes as its weights are. To name the device would take long."""
    return not (module.training or torch.is_grad_enabled() or torch.is_autocast_enabled())
