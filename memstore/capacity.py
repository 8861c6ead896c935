"""Capacity: how many bytes of a device memories may reserve when nobody says so."""

from __future__ import annotations

import os

import torch

FREE_RATIO = 0.8
"""Share of the free device memory; the rest is for the search's own working memory."""


def capacity_of(device: torch.device) -> int:
    """Bytes: 0.8 of what is free on the device at this moment."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * FREE_RATIO)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * FREE_RATIO)
