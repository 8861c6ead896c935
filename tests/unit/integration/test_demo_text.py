"""The demo's texts: what is read of a folder, of a file, and of the standard library."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.demo.text import OTHER_PACKAGES, READ_PACKAGES, NoText, from_path, standard_library

ALL = 1_000_000


def _folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    files = {"b.txt": b"two ", "a/z.md": b"one ", "c.bin": b"\0\1", ".git/config": b"hidden", "a/.note": b"hidden"}
    document = from_path(_folder(tmp_path / "book", files), ALL)
    assert document.text == "one two "
    assert document.name == "book"


def test_a_folder_within_a_hidden_one_is_read(tmp_path: Path) -> None:
    assert from_path(_folder(tmp_path / ".cache" / "book", {"a.txt": b"text"}), ALL).text == "text"


def test_no_more_files_are_read_than_are_needed(tmp_path: Path) -> None:
    files = {f"{number}.txt": b"x" * 60 for number in range(9)}
    assert len(from_path(_folder(tmp_path, files), 100).text) == 120


def test_a_relative_folder_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "here", {"a.txt": b"text"})
    monkeypatch.chdir(tmp_path / "here")
    assert from_path(Path("."), ALL).name == "here"


def test_what_is_no_utf8_is_still_read(tmp_path: Path) -> None:
    assert from_path(_folder(tmp_path, {"a.txt": b"caf\xe9"}) / "a.txt", ALL).text == "caf\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("files", [{}, {"a.bin": b"text\0"}, {"a.txt": b"\n \n"}, {".a.txt": b"text"}])
def test_a_folder_without_text_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(NoText, match="holds no text"):
        from_path(_folder(tmp_path, files), ALL)


def test_the_library_is_read_in_the_order_of_its_packages_without_its_tests(tmp_path: Path) -> None:
    files = {"z/a.py": b"1", "z/test/b.py": b"no", "a/b.py": b"2", "a/a.py": b"3", "c/a.py": b"no", "a/a.txt": b"no"}
    document = standard_library(("z", "a"), _folder(tmp_path, files))
    assert document.text == "# file: z/a.py\n1\n# file: a/a.py\n3\n# file: a/b.py\n2\n"
    assert document.name == "Python standard library: z, a"


def test_a_python_without_its_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoText, match=r"no source of the standard library under .*--text"):
        standard_library(READ_PACKAGES, tmp_path)


def test_the_texts_by_default_are_long_enough_and_share_no_file() -> None:
    read, other = standard_library(READ_PACKAGES), standard_library(OTHER_PACKAGES)
    assert len(read.text) > 3.2 * 100_000
    assert len(other.text) > 3.2 * 16_384
    assert not set(READ_PACKAGES) & set(OTHER_PACKAGES)
