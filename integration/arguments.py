"""Arguments of the commands: what a word on the command line must be, told in a line where it is not."""

from __future__ import annotations

import argparse

import torch


def count(text: str) -> int:
    """A whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def device(name: str) -> str:
    """The name of a device that torch can use here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name
