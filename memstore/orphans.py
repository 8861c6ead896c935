"""Orphans: folders of memories that the catalogue does not have, and which of them nobody can miss.

A drop marks the folder before the catalogue forgets the memory, and renames it after that (removals.py); a memory that
is made has files before it is in the catalogue. A process that is killed in between leaves a folder that

    is marked           its memory was being dropped
    has no change       its memory was being made, and nobody was told that it is there

and goes. Whatever else the catalogue does not have may be all that is left where the catalogue itself was lost, or
another one was given: it is left as it is, and reported.
"""

from __future__ import annotations

import logging
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

from memstore.folder import FIRST_SEGMENT, MemoryFolder, folders
from memstore.log import SegmentReader
from memstore.logs import event, trouble

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from memstore.seams import Disk

_log = logging.getLogger(__name__)


def missed_by_nobody(data: Path, known: Collection[Path], disk: Disk) -> Iterator[Path]:
    """The folders that may go; what else is no memory's is logged. known: those that the catalogue has.

    Each is looked at when it is asked for, after what was done with the one before. Raises OSError.
    """
    for path in folders(data, disk):
        if path in known or not disk.names(path):  # empty, or a file
            continue
        try:
            folder = MemoryFolder(path, disk)
            if folder.is_passing or not _has_changes(folder):
                yield path
                continue
        except OSError as error:
            trouble(_log, "folder of no memory cannot be read", error, folder=path)
            continue
        event(_log, logging.WARNING, "folder of no memory left as it is", folder=path)


def _has_changes(folder: MemoryFolder) -> bool:
    """Whether a folder has anything that a memory that was just being made would not have."""
    only = folder.segment(FIRST_SEGMENT)
    if folder.disk.names(folder.path) != [only.name]:
        return True
    with closing(folder.disk.open(only)) as file:
        reader = SegmentReader(file)
        num_records = sum(1 for _ in islice(reader.records(None), 2))
        is_whole = reader.end == file.size
        return not (num_records <= 1 and is_whole) and not (num_records == 0 and reader.is_cut_short)
