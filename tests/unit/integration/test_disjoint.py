"""Shingles: what they see as the same text, what they do not, and how shares are counted."""

import numpy as np

from integration.training.disjoint import measure, shared_ratio, shingles, split_files, union

LINES = [f"value_{n} = call_{n}()" for n in range(20)]


def text_of(lines: list[str]) -> str:
    """The lines as one file."""
    return "\n".join(lines) + "\n"


def test_blank_lines_and_indentation_do_not_hide_a_copy() -> None:
    """A copy moved into a class and spaced out has the same shingles."""
    moved = "\n\n".join("    " + line for line in LINES)
    assert np.array_equal(shingles(moved), shingles(text_of(LINES)))


def test_short_files_have_no_shingles() -> None:
    """Four lines are too few to prove a copy; five make one shingle."""
    assert shingles(text_of(LINES[:4])).size == 0
    assert shingles(text_of(LINES[:5])).size == 1


def test_order_of_lines_matters() -> None:
    """The same lines the other way round share nothing."""
    assert shared_ratio(shingles(text_of(LINES[::-1])), shingles(text_of(LINES))) == 0.0


def test_share_counts_the_parts_shingles() -> None:
    """Ten of twenty copied lines are 6 of the 16 shingles of the copy."""
    copy = shingles(text_of([*LINES[:10], *(f"own_{n}()" for n in range(10))]))
    assert shared_ratio(copy, shingles(text_of(LINES))) == 6 / 16
    assert shared_ratio(np.empty(0, np.uint64), copy) == 0.0
    assert union([]).size == 0


def test_documents_split_into_the_files_they_were_made_of() -> None:
    """Each `# file:` line opens a file."""
    document = "# file: a.py\nx = 1\n# file: b/c.py\ny = 2\n\nz = 3\n"
    assert list(split_files(document)) == [("a.py", "x = 1\n"), ("b/c.py", "y = 2\n\nz = 3\n")]


def test_measure_sees_a_vendored_file() -> None:
    """One stdlib file of two copied into training gives half of the shingles."""
    other = shingles(text_of([f"other_{n}" for n in range(20)]))
    overlap = measure([shingles(text_of(LINES)), other], [shingles(text_of(LINES))], "3.11")
    assert overlap.stdlib_shingles_in_training_ratio == 0.5
    assert overlap.stdlib_files_over_5_percent == 1
    assert overlap.worst_training_file_ratio == 1.0
