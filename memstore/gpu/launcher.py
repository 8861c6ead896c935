"""Kernels started without what Triton does each time to find the compiled one, which takes longer than to start it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton
    from triton.compiler import CompiledKernel

ALIGNMENT = 16
"""Bytes: Triton compiles a kernel of its own for addresses that are no multiples of this."""

LARGEST = (1 << 31) - 1
"""The same holds for larger numbers."""

_compiled: dict[tuple[object, ...], CompiledKernel] = {}


def start(
    kernel: triton.JITFunction[Any],
    grid: tuple[int, ...],
    *arguments: torch.Tensor | int,
    num_warps: int = 4,
    is_chained: bool = False,
    **constants: float,
) -> None:
    """Starts a kernel in the current stream; compiles it where it is the first of its kind.

    arguments: all that are no constants, which come last in the kernel's signature; it must not be specialized for any
    of the numbers. is_chained: the kernel may begin while the one before it ends, and waits for that itself.
    """
    values: list[int] = []
    key: list[object] = [
        id(kernel),
        torch.cuda.current_device(),
        num_warps,
        is_chained,
        *constants,
        *constants.values(),
    ]
    addresses = numbers = 0
    for argument in arguments:
        if isinstance(argument, int):
            numbers |= argument
            values.append(argument)
        else:
            address = argument.data_ptr()
            addresses |= address
            values.append(address)
            key.append(argument.dtype)
    is_usual = addresses % ALIGNMENT == 0 and numbers <= LARGEST
    found = _compiled.get(tuple(key)) if is_usual else None
    if found is not None:
        found[(*grid, 1, 1)](*values, *constants.values(), is_chained)
        return
    ours = {"IS_CHAINED": is_chained, "num_warps": num_warps, "launch_pdl": is_chained}
    compiled = kernel[grid](*arguments, **constants, **ours)
    if is_usual and compiled is not None:
        _compiled[tuple(key)] = compiled


@lru_cache(maxsize=64)
def can_chain(device: torch.device) -> bool:
    """Whether kernels can be begun while the one before them ends: from Hopper on."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def chained(device: torch.device) -> dict[str, bool]:
    """What a kernel is told by Triton's own way to start it, for the same."""
    is_able = can_chain(device)
    return {"IS_CHAINED": is_able, "launch_pdl": is_able}
