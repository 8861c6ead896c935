"""Compiling: what makes machine code of a function, at its first call, and keeps it on disk for the next process."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from numba import njit
from numba.core.caching import Cache, CompileResultCacheImpl, _CacheLocator

from memstore.logs import event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

FAST_MATH = {"reassoc", "contract", "nsz"}
"""Sums may be taken in another order, as their vector form needs; infinities and NaN mean what they always do."""

SOURCES = Path(__file__).parent
STALE_S = 30 * 86_400.0
"""How long no process has begun with a folder of machine code before it is taken to be one of sources that are gone."""
_KEPT = re.compile(r"\.?kernels-[0-9a-f]{16}(\.\d+)?")
UNREADABLE = (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, ValueError, TypeError, KeyError)


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function at its first call of each type; frees the interpreter lock; kept on disk where one can."""
    compiled = njit(nogil=True, fastmath=FAST_MATH)(function)
    if folder() is not None:
        compiled._cache = _KernelCache(function)
    return compiled


@cache
def tell_once(kept: Path | None) -> None:
    """Says that there is a wait, and what for; a warning, so that it is seen where nobody has asked for a log."""
    message = "search is compiled for this processor, for a minute or two; what is kept, the next process reads"
    event(logger, logging.WARNING, message, kept=kept or "nowhere")


def inlined(function: Callable[..., Any]) -> Any:
    """The same of a function whose code is put where it is called: a call costs as much as reading a row of codes."""
    return njit(nogil=True, fastmath=FAST_MATH, inline="always")(function)


@cache
def folder() -> Path | None:
    """Where machine code is kept: beside the sources, or in the user's folder for such things, or nowhere.

    Its name stands for all sources here, as one kernel is compiled into another. What is in it is loaded as code, so it
    must be ours.
    """
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.py")):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    found = next((path / name for path in _parents() if _is_ours(path / name)), None)
    if found is not None:
        _sweep(found)
    return found


def _parents() -> Iterator[Path]:
    yield SOURCES / "__pycache__"
    try:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memstore"
    except RuntimeError:  # nobody knows whose home that is
        return


def _sweep(mine: Path) -> None:
    """Removes folders of other sources that no process has begun with for long; says of this one that one has.

    A process that runs with one of them nevertheless has its code in memory, and compiles what it needs besides.
    """
    with suppress(OSError):
        os.utime(mine)
        oldest = mine.stat().st_mtime - STALE_S
        for path in (path for parent in _parents() if parent.is_dir() for path in parent.iterdir()):
            if path.name != mine.name and _KEPT.fullmatch(path.name):
                _remove_stale(path, oldest)


def _remove_stale(path: Path, oldest: float) -> None:
    """Whole or not at all for who begins with it at this moment. oldest: when it must have been used, Unix seconds."""
    with suppress(OSError):
        about = path.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and about.st_mtime < oldest:
            doomed = path.with_name(f".{path.name.strip('.').partition('.')[0]}.{os.getpid()}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def _is_ours(path: Path) -> bool:
    """Whether we can write to a folder that others cannot; it is made where it is not there."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        return os.name == "nt" or path.stat().st_mode & 0o022 == 0
    except OSError:
        return False


class _Locator(_CacheLocator):
    """Tells numba where."""

    def __init__(self, function: Callable[..., Any], file: str) -> None:
        self._line = function.__code__.co_firstlineno
        self._py_file = file

    def get_cache_path(self) -> str:
        return str(folder())

    def get_source_stamp(self) -> str:
        return ""  # the folder's name is one

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _Locator:
        return cls(function, file)


class _KernelCacheImpl(CompileResultCacheImpl):
    _locator_classes: ClassVar = [_Locator]


class _KernelCache(Cache):
    """What cannot be read or written is compiled, again next time, and no reason to fail."""

    _impl_class = _KernelCacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except UNREADABLE as error:
            event(logger, logging.WARNING, "compiled code cannot be read", reason=error)
            found = None
        if found is None:
            tell_once(folder())
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except UNREADABLE as error:
            event(logger, logging.WARNING, "compiled code cannot be kept", reason=error)
