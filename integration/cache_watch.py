"""CacheWatch: what happens to a model's key-value cache between two of its forwards."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class CacheWatch:
    """Knows a cache as a forward has left it. Of a cache that it has not seen it says nothing.

    The keys of the last layer, which depend on all that is before them, are held for as long as the cache is there.
    """

    def __init__(self) -> None:
        self._cache: Callable[[], Any] = _nothing
        self._length = 0
        self._layer = -1
        self._keys: list[torch.Tensor] = []

    def note(self, cache: Any, is_held: bool = False) -> None:
        """A forward has ended, and left this cache, or None. is_held: it is kept alive until the next call."""
        self._cache, self._length, self._layer, self._keys = _nothing, 0, -1, []
        if cache is None:
            return
        held = self._keys
        self._cache = (lambda: cache) if is_held else weakref.ref(cache, lambda _: held.clear())
        self._length = int(cache.get_seq_length())
        self._layer = _last_layer(cache)
        if self._layer >= 0:
            held.append(cache.layers[self._layer].keys)

    def note_next(self, cache: Any) -> bool:
        """The same after a forward of one token; False where it is another cache, or was not seen to grow by that."""
        if not self._knows(cache) or self._layer < 0:
            return False
        keys = cache.layers[self._layer].keys
        if keys.shape[2] != self._length + 1:
            return False
        self._length += 1
        self._keys[:] = (keys,)
        return True

    def is_as_left(self, cache: Any) -> bool:
        """True where a cache that grows by another tensor with each forward is what the last one has left."""
        if not self._knows(cache) or not self._keys:
            return False
        keys = cache.layers[self._layer].keys
        is_same: bool = keys is self._keys[0] and keys.shape[2] == self._length
        return is_same

    def takes_up(self, cache: Any) -> bool:
        """The same as a forward begins; where it is True the keys will be others, and are not held meanwhile."""
        keys = self._keys
        if not keys or cache is None or cache is not self._cache() or cache.layers[self._layer].keys is not keys[0]:
            return False
        if keys[0].shape[2] != self._length:
            return False
        keys.clear()
        return True

    @property
    def cache(self) -> Any:
        """The cache, if it is still there."""
        return self._cache()

    def cropped(self, cache: Any) -> int:
        """Tokens that were taken off the end of the cache since then."""
        return max(0, self._length - int(cache.get_seq_length())) if self._knows(cache) else 0

    def is_rearranged(self, cache: Any) -> bool:
        """True where a row of the batch is no longer what it was, in a cache that is not cropped.

        The states of the last token in the last layer are compared, as they depend on all that is before them, and only
        where the cache has another tensor than it had.
        """
        if not self._knows(cache) or not self._keys or self.cropped(cache):
            return False
        now = _last_layer(cache)
        keys, before = cache.layers[now].keys if now >= 0 else None, self._keys[0]
        if keys is None or keys is before:
            return False
        states = keys[:, :, _last(keys, self._length)]
        return not torch.equal(states, before[:, :, _last(before, self._length)].to(states.device))

    def _knows(self, cache: Any) -> bool:
        return cache is not None and cache is self._cache()


def _last(keys: torch.Tensor, length: int) -> int:
    """Where the last of `length` tokens is: a sliding window has fewer, a static cache has room for more."""
    return min(length, keys.shape[2]) - 1


def _last_layer(cache: Any) -> int:
    """Number of the last layer that keeps keys, (batch, heads, tokens, width); -1 where none does."""
    layers = getattr(cache, "layers", ())
    for number in range(len(layers) - 1, -1, -1):
        keys = getattr(layers[number], "keys", None)
        if isinstance(keys, torch.Tensor) and keys.dim() == 4 and keys.shape[2]:
            return number
    return -1


def _nothing() -> None:
    """No cache was seen."""
