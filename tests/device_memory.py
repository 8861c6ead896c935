"""What this process holds of a GPU, whoever else tests there."""

from __future__ import annotations

import os
import subprocess

import torch

COMMAND = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]


def device_bytes() -> int:
    """Bytes of the device that this process holds, torch's cache given back before.

    The driver counts them for each process, to the MiB. Where it does not say, as in some containers, it is what all
    processes hold together.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    own = _own_bytes()
    if own is not None:
        return own
    free, total = torch.cuda.mem_get_info()
    return total - free


def _own_bytes() -> int | None:
    try:
        said = subprocess.run(COMMAND, capture_output=True, text=True, check=True, timeout=30).stdout
        used = {int(pid): int(mebibytes) << 20 for pid, mebibytes in (line.split(",") for line in said.splitlines())}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return used.get(os.getpid())
