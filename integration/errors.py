"""AttachError: a use of a model that its memory cannot follow."""

from __future__ import annotations


class AttachError(RuntimeError):
    """The model cannot be attached, or is used in a way that its memory cannot follow; the message says which."""
