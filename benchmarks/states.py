"""Real hidden states: what enters the layer of the demo's model that looks its memory up, at its own width, 256.

The text is Python source: the standard library, then whatever packages are installed. No token is read twice.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator

WEIGHTS = Path(__file__).parents[1] / "integration" / "demo" / "weights" / "base"
LAYER = 4
DIM = 256
SEGMENT = 512
BYTES_A_TIME = 8 << 20
MOVED = 0.1
SEGMENTS_A_TIME = {"cpu": 16, "cuda": 512}


def many_states(num_rows: int, device: torch.device) -> torch.Tensor:
    """(num_rows, 256) float16, repeated where there is too little text for so many."""
    return repeated(states_of_text(num_rows, device), num_rows)


def states_of_text(most: int, device: torch.device) -> torch.Tensor:
    """(n, 256) float16 in the order of the text: `most` of them, or as many as the text here has."""
    try:
        return hidden_states(most, device)
    except TooLittleText as error:
        return hidden_states(error.num_rows, device)


def repeated(states: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(num_rows, 256): states, and where they are too few once more, each moved by a tenth of its length."""
    if num_rows <= len(states):
        return states[:num_rows]
    generator = torch.Generator(states.device).manual_seed(1)
    filled = torch.empty(num_rows, DIM, dtype=states.dtype, device=states.device)
    for first in range(0, num_rows, len(states)):
        some = filled[first : first + len(states)]
        some.copy_(states[: len(some)])
        if first:
            moves = torch.randn(some.shape, generator=generator, device=states.device)
            some += MOVED * some.float().norm(dim=-1, keepdim=True) * moves / moves.norm(dim=-1, keepdim=True)
    return filled


class TooLittleText(ValueError):
    """num_rows: states that the text here has."""

    def __init__(self, num_rows: int, asked: int) -> None:
        super().__init__(f"the text here has {num_rows} tokens, {asked} are asked for")
        self.num_rows = num_rows


def hidden_states(num_rows: int, device: torch.device) -> torch.Tensor:
    """(num_rows, 256) float16 on the device, in the order of the text. Raises TooLittleText."""
    model = _model(device)
    states = torch.empty(num_rows, DIM, dtype=torch.float16, device=device)
    filled = 0
    for segments in _segments(SEGMENTS_A_TIME[device.type]):
        with torch.inference_mode():
            found = model(input_ids=segments.to(device), use_cache=False).last_hidden_state.flatten(0, 1)
        kept = found[: num_rows - filled]
        states[filled : filled + len(kept)] = kept
        filled += len(kept)
        if filled == num_rows:
            return states
    raise TooLittleText(filled, num_rows)


def _model(device: torch.device) -> torch.nn.Module:
    """The layers up to the one that is asked for."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = LlamaForCausalLM.from_pretrained(WEIGHTS, dtype=dtype).model
    model.layers = model.layers[:LAYER]
    model.norm = torch.nn.Identity()
    moved: torch.nn.Module = model.eval().to(device)
    return moved


def _segments(num: int) -> Iterator[torch.Tensor]:
    """(num, 512) int64 token ids, one segment behind the other; what does not fill the last ones is left out."""
    left = torch.empty(0, dtype=torch.int64)
    for ids in _ids():
        left = torch.cat((left, ids))
        step = num * SEGMENT
        whole = len(left) - len(left) % step
        yield from left[:whole].view(-1, num, SEGMENT)
        left = left[whole:]


def _ids() -> Iterator[torch.Tensor]:
    """Token ids of some files at a time, (n,) int64."""
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    some: list[str] = []
    size = 0
    for path in _paths():
        some.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(some[-1])
        if size >= BYTES_A_TIME:
            yield _encoded(tokenizer, some)
            some, size = [], 0
    yield _encoded(tokenizer, some)


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return torch.cat([torch.tensor(each, dtype=torch.int64) for each in ids]) if ids else torch.empty(0).long()


@cache
def _paths() -> tuple[Path, ...]:
    """Source files, those of the standard library first."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")]
    found = [sorted(folder.rglob("*.py")) for folder in folders]
    return tuple(dict.fromkeys(path for paths in found for path in paths if path.is_file()))
