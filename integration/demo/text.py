"""The texts that the demo reads: the standard library's own source by default, or anyone's files."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

READ_PACKAGES = ("asyncio", "unittest", "concurrent", "multiprocessing", "logging", "importlib")
"""Packages of the standard library that are read, in this order, until the text is long enough."""

OTHER_PACKAGES = ("email", "xml", "http", "json", "urllib", "html", "ctypes", "curses")
"""Packages whose memory serves as the control: the same kind of text, none of the same files."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the name that the report calls it by."""

    name: str
    text: str


class NoText(Exception):
    """There is nothing to read; the message says where it was looked for."""


def standard_library(packages: tuple[str, ...], library: Path | None = None) -> Document:
    """The source of `packages`, file by file in the order of their paths, each file headed by its path.

    Raises NoText where this Python comes without its source.
    """
    root = library or Path(sysconfig.get_paths()["stdlib"])
    files = library_files(packages, root)
    parts = [f"# file: {file.relative_to(root).as_posix()}\n{_read(file)}\n" for file in files]
    if not parts:
        raise NoText(f"no source of the standard library under {root}; give a file with --text")
    return Document(name="Python standard library: " + ", ".join(packages), text="".join(parts))


def library_files(packages: tuple[str, ...], root: Path) -> list[Path]:
    """The modules of `packages` below the standard library's folder, without those of their tests."""
    found = (file for package in packages for file in sorted((root / package).rglob("*.py")))
    return [file for file in found if "test" not in file.relative_to(root).parts]


def from_path(path: Path, max_characters: int) -> Document:
    """The text of one file, or of the text files below a folder in the order of their paths, none of them hidden.

    Files are read until the text has `max_characters`. Raises NoText.
    """
    if not path.exists():
        raise NoText(f"{path}: there is no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_shown(file.relative_to(path)))
    text = ""
    for file in files:
        if len(text) < max_characters and _is_text(file):
            text += _read(file)
    if not text.strip():
        raise NoText(f"{path}: holds no text")
    return Document(name=path.resolve().name, text=text)


def _is_shown(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _is_text(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8192)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
