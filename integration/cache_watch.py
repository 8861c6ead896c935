"""CacheWatch: what happens to a model's key-value cache between two of its forwards."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class CacheWatch:
    """Knows a cache as a forward has left it. Of a cache that it has not seen it says nothing."""

    def __init__(self) -> None:
        self._cache: Callable[[], Any] = _nothing
        self._length = 0
        self._keys: Callable[[], torch.Tensor | None] = _nothing
        self._states: torch.Tensor | None = None

    def note(self, cache: Any, is_held: bool = False) -> None:
        """A forward has ended, and left this cache, or None. is_held: it is kept alive until the next call."""
        self._cache, self._length, self._keys, self._states = _nothing, 0, _nothing, None
        if cache is None:
            return
        self._cache = (lambda: cache) if is_held else weakref.ref(cache)
        self._length = int(cache.get_seq_length())
        keys = _last_keys(cache)
        if keys is not None:
            self._keys = weakref.ref(keys)
            self._states = keys[:, :, _last(keys, self._length)].detach().clone()

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
        if not self._knows(cache) or self._states is None or self.cropped(cache):
            return False
        keys = _last_keys(cache)
        if keys is None or keys is self._keys():
            return False
        states = keys[:, :, _last(keys, self._length)]
        return not torch.equal(states, self._states.to(states.device))

    def _knows(self, cache: Any) -> bool:
        return cache is not None and cache is self._cache()


def _last(keys: torch.Tensor, length: int) -> int:
    """Where the last of `length` tokens is: a sliding window has fewer, a static cache has room for more."""
    return min(length, keys.shape[2]) - 1


def _last_keys(cache: Any) -> torch.Tensor | None:
    """Keys (batch, heads, tokens, width) of the last layer that keeps some."""
    for layer in reversed(getattr(cache, "layers", ())):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor) and keys.dim() == 4 and keys.shape[2]:
            return keys
    return None


def _nothing() -> None:
    """No cache was seen."""
