"""Mutations: bytes and JSON values with something changed in them, at random."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from random import Random

ODD: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1 << 31,
    1 << 63,
    1 << 70,
    1.5,
    float("inf"),
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
)
"""What stands where something else should."""
NESTED = b"[" * 100_000
"""More than a reader that calls itself can follow."""


def mutated(content: bytes, random: Random) -> bytes:
    """The content with some bytes changed, taken out, put in, or taken from elsewhere in it."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed) + 1)
        match random.randrange(4):
            case 0 if at < len(changed):
                changed[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])
            case 1:
                del changed[at : at + random.randint(1, 8)]
            case 2:
                changed[at:at] = random.randbytes(random.randint(1, 8))
            case _:
                begin = random.randrange(len(changed) + 1)
                changed[at:at] = changed[begin : begin + random.randint(1, 32)]
    return bytes(changed)


def mutated_json(content: bytes, random: Random) -> bytes:
    """JSON with one or two of its values replaced, taken out or doubled; now and then no JSON at all."""
    if random.random() < 0.01:
        return NESTED
    if random.random() < 0.2:
        return mutated(content, random)
    value = json.loads(content)
    for _ in range(random.randint(1, 2)):
        holder, key = random.choice([*_places(value)])
        match random.randrange(4):
            case 0 if isinstance(holder, list):
                holder.insert(key, holder[key])
            case 1:
                del holder[key]
            case 2 if isinstance(holder[key], int):
                holder[key] += random.choice([-1, 1, 1 << 40])
            case _:
                holder[key] = deepcopy(random.choice(ODD))  # the next change may be within it
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every value in a value, as what holds it and its key there; none in an empty one but one in a box of its own."""
    found: list[tuple[Any, Any]] = []
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        found += _places(value[key])
    return found or [([value], 0)]
